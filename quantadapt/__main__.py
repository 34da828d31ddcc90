"""`python -m quantadapt` is `quantadapt`, for `torchrun -m` and `accelerate launch -m`."""

from .cli import main

main()
