"""VLV (arXiv 2507.07104): an image as 77 caption embeddings, and the caption read from them."""
