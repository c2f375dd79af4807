"""Training: one run, from rows to a candidate."""
