"""Weights of a run or a folder, read part by part."""
