"""`python -m quantadapt.cli` is `quantadapt`."""

from . import main

main()
