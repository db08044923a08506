"""Weights that other projects published, by the names of our networks."""
