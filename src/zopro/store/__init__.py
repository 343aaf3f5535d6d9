"""What is on the disk: whole files, the lock, journals, and the layout of a run directory."""
