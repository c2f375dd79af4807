"""Data: reactions become rewards, and rows to learn from."""
