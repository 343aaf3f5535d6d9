"""Objectives, trainers, and the registry of methods."""
