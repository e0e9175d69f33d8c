"""`python -m warmerge`."""

from warmerge.cli import main

main()
