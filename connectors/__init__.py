"""Connectors: each turns one platform's events into bot types and back."""
