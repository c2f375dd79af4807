"""Rollout: train when there is enough new feedback, and make versions live."""
