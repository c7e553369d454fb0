"""The paper's tables and equations as data, next to our own figures.

Imports counting/. Start at command.py.
"""
