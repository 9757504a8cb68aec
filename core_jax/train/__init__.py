"""Training: a pure step, the loop around it, checkpoints and metric writers."""
