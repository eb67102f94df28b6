"""Directions of a model: estimated from what it does on matched pairs, kept in files, exchanged with other tools."""

from typing import Literal

Site = Literal["mlp", "residual"]
