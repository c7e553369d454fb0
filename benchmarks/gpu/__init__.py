"""What waits for a GPU: `wheels.py` collects what a bare machine lacks, `run.py` measures there, in one command."""
