"""Benchmarks of the loader, attentions and training steps, the soak test, and compilation for absent accelerators.

Imports training/. Other projects' networks and loaders are in benchmarks/. Start at step.py, or compile.py.
"""
