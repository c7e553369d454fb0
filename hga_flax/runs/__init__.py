"""A run on disk: checkpoints, metrics, the workdir's other files, its copy in a bucket, and the console.

Orbax and TensorBoard have one file each.
Imports processes/ and what stands before it. Start at workdir.py for the files, checkpoints.py for checkpoints.
"""
