"""GPU checks: `wheels.py` collects the packages a bare machine lacks, `run.py` runs all checks with one command."""
