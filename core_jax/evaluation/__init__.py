"""Intervals and reports; nothing here needs an accelerator."""
