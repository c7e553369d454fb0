"""Studies: one recipe in several variants and seeds, run by any number of workers and compared statistically.

It may import every other room; only the commands import it. Start at study.py.
"""
