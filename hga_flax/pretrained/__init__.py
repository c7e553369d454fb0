"""Published weights: their files are read without running code in them and fitted to our networks.

Imports models/ and attention/. Start at torch_weights.py.
"""
