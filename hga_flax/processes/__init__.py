"""The processes and devices of a run: connecting processes, placing arrays on devices, handling signals.

Imports config/. Start at distributed.py.
"""
