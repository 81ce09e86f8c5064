"""What drawings of all stains share: outlines and noise, and the way from density to pixels."""
