"""A page on which people try a model; needs the extra `demo`."""
