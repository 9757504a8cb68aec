"""What can be known and started from a machine without an accelerator: plans of jobs."""
