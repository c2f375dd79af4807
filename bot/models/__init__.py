"""Models: the properties of a language model (shape, template, sampling, memory), without loading it."""
