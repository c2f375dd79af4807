"""Judging: decide from people's opinions whether a version is better."""
