"""Single images: files, headers, decoding, cropping and augmentation, on the host and on the device.

Only this room decodes images (OpenCV and simplejpeg). Start at decoding.py.
"""

import os

# The most pixels that an image's header may claim, in any format; checked before memory is allocated. It is the limit
# at which Pillow raises DecompressionBombError: 512 MB as RGB. The largest photographs have 150 million pixels.
MAX_PIXELS = 178_956_970
# OpenCV reads this when it is imported; it applies to the formats that image_heads.py does not know.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
