"""Experiments: one file each, `:mini` beside every full-size one."""
