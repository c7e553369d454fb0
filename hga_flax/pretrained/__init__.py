"""Published weights: reads their files without executing any code in them, and converts them for our networks.

Imports models/ and attention/. Start at torch_weights.py.
"""
