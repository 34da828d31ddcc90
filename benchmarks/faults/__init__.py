"""Faults: commands are killed, disturbed, starved of disk and called twice; what is left is judged.

`python -m benchmarks.faults` does all of it, `--share 0.1` a tenth.
"""
