"""Models: the models that are trained, and the files of their versions."""
