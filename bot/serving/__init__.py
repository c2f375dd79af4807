"""Serving: the vLLM that answers, its client, and the processes that kibitz starts."""
