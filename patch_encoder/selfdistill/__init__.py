"""Self-distillation of a patch encoder without labels: views, networks, losses and monitors."""
