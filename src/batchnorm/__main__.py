"""`python -m batchnorm`: the command."""

from batchnorm.cli import main

main()
