"""Fitting: the small models that memory and chat use, learned."""
