"""Directions of a model: estimated from what it does on matched pairs, kept in files, exchanged with other tools."""
