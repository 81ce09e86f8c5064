"""Losses of detection_kd: pure functions of tensors."""
