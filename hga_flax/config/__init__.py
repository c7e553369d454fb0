"""From a file of configs/ and the command line to a checked configuration.

Imports attention/ and models/, whose names and options it checks. Start at loading.py; rules.py has the rule of
each key.
"""
