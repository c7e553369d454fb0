"""Studies: one recipe in several variants and seeds, made by any number of workers and compared with statistics.

Imports everything; nothing imports it but the commands. Start at study.py.
"""
