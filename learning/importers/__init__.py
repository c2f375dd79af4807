"""Importers: convert other programs' recorded conversations to kibitz's form."""
