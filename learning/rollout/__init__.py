"""Rollout: the loop that trains when there is enough to learn, and takes versions live."""
