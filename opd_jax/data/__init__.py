"""Rows of data sources, and what is made of them; the only grain."""
