"""Scores of held-out data, and the pictures that go with them."""
