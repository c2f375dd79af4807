"""Chat: one dialogue, from a message to its answer and what people said of it."""
