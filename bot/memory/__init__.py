"""Memory: recall earlier messages, and describe the state of a conversation."""
