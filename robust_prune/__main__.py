"""`python -m robust_prune`."""

from robust_prune.cli import main

main()
