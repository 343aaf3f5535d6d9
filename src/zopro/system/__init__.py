"""Processes and ranks, threads, memory, random state, lazy imports, time limits of foreign functions."""
