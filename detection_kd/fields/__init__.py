"""Tiles of annotated fields: where they lie, how they are read, stained, augmented and drawn."""
