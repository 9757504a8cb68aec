"""The figures of the README, made again: `python -m miniature.results`."""
