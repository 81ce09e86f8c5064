"""What a pre-training run by self-distillation keeps, and how its values change with the step."""
