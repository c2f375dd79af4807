"""Serving: the vLLM server, its client, and child processes."""
