"""Pure Flax modules: decoder, prefill, encoders, tokenizers."""
