"""Ahead-of-time compilation for TPU topologies: memory, FLOPs, time."""
