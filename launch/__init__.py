"""Starting jobs on machines, and what a job costs before it is started (docs/launching.md)."""
