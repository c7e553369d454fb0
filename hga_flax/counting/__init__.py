"""The cost of a network or a compiled program: parameters, operations, bytes.

Imports models/ and attention/. Start at complexity.py for networks, compiled.py for compiled programs.
"""
