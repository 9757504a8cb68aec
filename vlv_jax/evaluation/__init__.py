"""Measuring redrawings and captions; nothing here needs an accelerator."""
