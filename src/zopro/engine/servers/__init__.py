"""Engines that serve: they hold the model, theta is an adapter that they are handed anew whenever it changes."""
