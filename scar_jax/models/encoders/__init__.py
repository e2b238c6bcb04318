"""Networks whose features are conditions: images and text."""
