"""Makes `python -m fxwidth` the command."""

from fxwidth.cli import main

main()
