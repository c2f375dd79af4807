"""The command line. Each command only calls a function of another module."""
