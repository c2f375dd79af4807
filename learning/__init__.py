"""Learning: feedback becomes a better policy."""
