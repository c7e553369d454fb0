"""Dry runs; benchmarks of the loader, attentions and steps; the soak test; compilation for absent accelerators.

Imports training/. Other projects' networks and loaders are in benchmarks/. Start at step.py, or compile.py.
"""
