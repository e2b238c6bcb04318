"""The references' side of `scar bench reference`: PyTorch, and no JAX.

It runs in a process of its own (`process.py`), as its users have it. What
memory another library has taken and freed in a process speeds PyTorch up:
VQ-16's encoder took 0.65 s by itself and 0.47 s where JAX had run before.
"""
