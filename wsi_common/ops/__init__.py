"""What the compiled operators share: building, loading, registration, and the layer around them."""
