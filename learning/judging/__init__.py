"""Judging: whether a version is better, from what people said."""
