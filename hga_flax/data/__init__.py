"""Sources, augmentation and the input pipeline. Grain and TFDS are imported here alone."""
