"""The one trainer: state, step, loop, checkpoints."""
