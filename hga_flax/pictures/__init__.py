"""Pictures of runs and of trained networks; matplotlib is imported here alone, and when a picture is drawn."""
