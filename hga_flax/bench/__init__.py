"""Measurements: the loader, attentions, training steps, killed runs, and programs compiled for absent accelerators.

Imports training/; the networks and loaders of others lie in benchmarks/. Start at step.py, or compile.py.
"""
