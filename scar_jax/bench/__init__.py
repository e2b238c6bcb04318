"""Speed on this machine: one module for each `scar bench NAME`.

A module holds `run(given) -> Report`. It measures compiled calls only, after a
warm-up and taking turns, so that its rows may be compared with each other; all
in one process, but for the references of `reference.py`.
"""
