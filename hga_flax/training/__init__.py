"""The training loop and its parts. Only the commands import this package."""
