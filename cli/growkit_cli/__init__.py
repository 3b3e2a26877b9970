"""The growkit command: one sub-command, one module, one library function."""
