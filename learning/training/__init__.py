"""Training: one training run, from recorded feedback to a candidate."""
