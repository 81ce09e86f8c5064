"""Self-distillation of patch encoders: views, networks, losses and monitors."""
