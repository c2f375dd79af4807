"""Bench: measure what the project claims."""
