"""Orders: how a target is cut into sets, and the layout of a sequence."""
