"""Models: what a language model is, found out before it is loaded: shape, template, sampling, memory."""
