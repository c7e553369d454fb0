"""Measures the loader, attentions, training steps, killed runs, and programs compiled for absent accelerators.

Imports training/; other projects' networks and loaders are in benchmarks/. Start at step.py, or compile.py.
"""
