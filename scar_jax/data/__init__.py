"""Records in, batches out: sources, transforms, text, the grain pipeline."""
