"""Pictures and tables of runs and of networks.

Only this room imports matplotlib, and only when a picture is drawn. Start at curves.py, or explain.py for Grad-CAM
and gates.
"""

import logging

# An unwritable cache (no home folder) does not prevent drawing; hide matplotlib's six lines about it.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
