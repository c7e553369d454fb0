"""Learning: the state, the step, the optimizer, the metrics, evaluation, and the loop that puts them together.

Imports all that stands before it. Start at trainer.py for the loop, step.py for what is compiled.
"""
