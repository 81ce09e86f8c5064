"""Losses of self-distillation and the targets that a teacher gives: pure functions of tensors."""
