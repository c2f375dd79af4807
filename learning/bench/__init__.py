"""Bench: what the project claims, measured."""
