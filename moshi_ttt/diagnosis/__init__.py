"""Where a generation changes, and whether it can be heard."""
