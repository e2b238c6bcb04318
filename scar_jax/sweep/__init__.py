"""Sweeps: many runs of one recipe, and what they say together."""
