"""GPU checks: `wheels.py` collects the packages that a bare machine lacks, `run.py` runs all checks in one command."""
