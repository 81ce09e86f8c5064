"""Everything that localises or distils: lesion detector, D2VFM distillation, student extraction."""
