"""Name tables between public PyTorch checkpoints and our parameters."""
