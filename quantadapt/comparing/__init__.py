"""Which quantization and which adapter: a grid of runs on one model and data, compared."""
