"""The processes and devices of a run: how they find each other, how arrays lie on them, and what a signal does.

Imports config/. Start at distributed.py.
"""
