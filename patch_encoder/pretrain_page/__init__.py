"""One page on a pre-training run: its curves, and what the network sees, attends to and groups."""
