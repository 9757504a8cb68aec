"""Sources, image decoding, preprocessing and batching; docs/data.md is the guide."""
