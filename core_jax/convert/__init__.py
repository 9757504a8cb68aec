"""Between a hub directory's tensors and our parameter trees: rules and bytes only."""
