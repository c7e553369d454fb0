"""Studies: one recipe in several variants and seeds, made by any number of workers and compared with statistics.

Above training/, data/ and analysis/; nothing imports it but `python -m hga_flax study` and `report`.
"""
