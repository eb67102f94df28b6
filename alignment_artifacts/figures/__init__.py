"""Figures: the numbers they show, and how they are drawn on paper and on a screen."""
