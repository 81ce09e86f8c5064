"""Encoders: what turns a tile into a feature vector."""
