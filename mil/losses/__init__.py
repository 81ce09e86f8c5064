"""Losses of MIL models beyond the task's criterion, as functions of tensors."""
