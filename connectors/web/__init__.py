"""The web: the chat page and the OpenAI-compatible API."""
