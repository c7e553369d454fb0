"""The paper's tables and equations as data, and ours beside them.

Imports counting/. Start at command.py.
"""
