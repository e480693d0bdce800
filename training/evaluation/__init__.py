"""Judging an encoder by its frozen features."""
