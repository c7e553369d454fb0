"""A run on disk: checkpoints, metrics, the workdir's other files, its copy in a bucket, and the console.

Only checkpoints.py imports Orbax, and only writers.py imports tensorboardX.
Imports processes/ and the rooms before it. Start at workdir.py for the files, checkpoints.py for checkpoints.
"""
