"""`python -m growkit_cli` is the growkit program, for torchrun."""

from growkit_cli.main import main

main()
