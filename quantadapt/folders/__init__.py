"""What is written whole or not at all, and what a run folder holds."""
