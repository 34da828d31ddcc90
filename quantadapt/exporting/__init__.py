"""The export stage: save, load, merge."""
