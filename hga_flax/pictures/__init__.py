"""Pictures of runs and of trained networks; matplotlib is imported here alone, and when a picture is drawn."""

import logging

# A cache that cannot be written (no home folder) is no reason not to draw, nor for matplotlib's six lines about it.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
