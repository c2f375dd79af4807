"""Fitting: fit the small models that memory and chat use."""
