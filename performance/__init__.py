"""Measurements that anyone can repeat, one script a question."""
