"""The loop: stages, evaluation, recording, replay, export."""
