"""Data sets, and the pipeline that makes batches of them. Only this room imports Grain and TensorFlow Datasets.

Imports images/ and storage/. Start at pipeline.py; sources.py opens a data set by its name.
"""
