"""Our side of `scar bench reference`, a module for each reference.

A maker takes the weights and inputs of the other side (`theirs/`) and returns
an `Ours` that does the same work.
"""
