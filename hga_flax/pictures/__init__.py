"""Pictures and tables of runs and of trained networks.

matplotlib is imported here alone, and when a picture is drawn. Start at curves.py, or explain.py for Grad-CAM and
gates.
"""

import logging

# A cache that cannot be written (no home folder) is no reason not to draw, nor for matplotlib's six lines about it.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
