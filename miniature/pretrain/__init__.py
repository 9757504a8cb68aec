"""Trains the stand-ins for the hub: a text-to-image pipeline, a Florence-2 and three Qwen2.5."""
