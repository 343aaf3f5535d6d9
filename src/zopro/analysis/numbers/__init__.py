"""What is computed of trajectories."""
