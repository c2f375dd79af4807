"""Importers: other programs' recorded conversations, in kibitz's form."""
