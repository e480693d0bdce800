"""Evaluating an encoder by its frozen features."""
