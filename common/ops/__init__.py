"""Everything the two compiled operators share: building, loading, registration with PyTorch."""
