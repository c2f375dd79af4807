"""Data: turn reactions into rewards, and into rows to train on."""
