"""Turns a configuration file and the command line into a checked configuration.

Imports attention/ and models/, whose names and options it checks. Start at loading.py; keys.py has the table of keys,
checks.py applies it.
"""
