"""Studies: the same recipe in several variants and seeds, run by any number of workers and compared with statistics."""
