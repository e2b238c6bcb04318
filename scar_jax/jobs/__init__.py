"""Many requests from a file: what they are, and who makes which."""
