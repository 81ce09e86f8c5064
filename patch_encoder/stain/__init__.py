"""Separation, normalisation and augmentation of H&E stains on batches of uint8 tiles."""
