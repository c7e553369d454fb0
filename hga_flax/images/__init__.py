"""One image: its file, its head, decoding, cropping and augmenting it, on the host and on the device.

OpenCV and simplejpeg are imported here alone. Start at host_augmentation.py.
"""

import os

# Of an image of any format, by what its head claims, before memory is asked for. Pillow's limit, beyond which it
# raises DecompressionBombError: 512 MB of colours, where the largest photographs have 150 million pixels.
MAX_PIXELS = 178_956_970
# Which OpenCV reads when it is imported: for the formats that image_heads.py does not know.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
