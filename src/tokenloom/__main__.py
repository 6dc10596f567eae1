"""`python -m tokenloom` is the command line."""

from tokenloom.cli import main

main()
