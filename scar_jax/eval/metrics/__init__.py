"""Metrics of papers: pure numbers in here, networks behind small classes."""
