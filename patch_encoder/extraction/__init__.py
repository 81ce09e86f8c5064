"""From tiles to features: decoding, the network on the device, the loop over a cohort, Ray."""
