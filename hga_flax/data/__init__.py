"""Data sets and the pipeline that makes batches of them. Grain and TensorFlow Datasets are imported here alone.

Imports images/ and storage/. Start at pipeline.py; sources.py opens a data set by its name.
"""
