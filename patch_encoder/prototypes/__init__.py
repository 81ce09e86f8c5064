"""Slide-level prototypes: region encoder, views of regions, clusters, neighbours and their loss."""
