"""MASSV (arXiv 2505.10526): multimodal drafters for speculative decoding."""
