"""Learning: train better policies from feedback."""
