"""`python -m glasshouse` is `glasshouse`."""

from glasshouse.cli import main

main()
