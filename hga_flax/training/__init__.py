"""Training: state, step, optimizer, metrics, evaluation, and the loop that puts them together.

Imports runs/ and the rooms before it. Start at trainer.py for the loop, step.py for the compiled steps.
"""
