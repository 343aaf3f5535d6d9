"""The engine over transformers, on any device."""
