"""Chat: take a message, answer it, and record feedback on the answer."""
