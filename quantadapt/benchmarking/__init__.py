"""Benchmarks of lm-evaluation-harness, measured on models as they are in memory."""
