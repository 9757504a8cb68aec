"""Speed, measured against peers on the same weights; docs/benchmarks.md says how to read it."""
