"""Lesion boxes: a detector on an encoder, its data, its metrics."""
