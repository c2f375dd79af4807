"""Models: the models that training changes, and the files of versions."""
