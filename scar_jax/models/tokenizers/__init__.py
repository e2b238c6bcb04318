"""Image tokenizers and what trains them."""
