"""Some 1800 bad inputs, what the real commands make of each, and the count by outcome.

    python -m benchmarks.bad_inputs [--kind NAME] [--match TEXT] [--every N] [--show OUTCOME]

Run it in the folder above `benchmarks/`. It needs no network and no GPU; all files are made anew in
a temporary folder, the same ones each time. `cases.py` says what a case is, the files called after
what they damage list them, `campaign.py` runs them.
"""
