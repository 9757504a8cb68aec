"""A small world that stands in for web images and for the hub's checkpoints."""
