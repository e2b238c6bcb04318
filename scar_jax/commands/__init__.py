"""Subcommands of `scar`: one module each, imported when asked for.

A module holds `define(flags)`, which declares its flags, and `run(args)`, which
does the work with one library call and returns what it says at the end.
"""
