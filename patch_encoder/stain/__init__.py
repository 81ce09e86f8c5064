"""Stain: separation, normalisation and augmentation of haematoxylin and eosin on batches of uint8
tiles.
"""
