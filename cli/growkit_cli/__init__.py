"""The growkit command: one module for each sub-command."""
