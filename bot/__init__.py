"""kibitz, the half that hears, answers and remembers."""

__version__ = "0.1.0"
