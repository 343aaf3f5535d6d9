"""Saved adapters and models as named tensors: read, subtract, interpolate."""
