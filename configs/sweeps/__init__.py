"""One file for each ablation of the paper; run them with `scar sweep`."""
