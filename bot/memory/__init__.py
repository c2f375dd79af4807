"""Memory: what of earlier conversations is found again, and what a conversation is about."""
