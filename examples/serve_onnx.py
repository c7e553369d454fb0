"""Classifies images with an exported network; needs only ONNX Runtime, NumPy and OpenCV (no JAX, no hga_flax).

python -m hga_flax export --workdir=DIR --format=onnx --out=network.onnx
python examples/serve_onnx.py network.onnx IMAGE... [--top=5]
"""

import argparse
import json
import sys

import cv2
import numpy as np
import onnxruntime


def read_image(file: str, how: dict) -> np.ndarray:
    """Returns uint8 `[height, width, channels]`, as the network's metadata say; raises a ValueError if it cannot."""
    data = np.fromfile(file, np.uint8)
    if not data.size:
        raise ValueError("the file is empty")
    if data[4:8].tobytes() == b"ftyp" or data[:1].tobytes() in b"PIM":  # which OpenCV may show wrongly
        raise ValueError("AVIF, TIFF, PGM and their like are not read here; convert it to PNG or JPEG")
    image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB if how["channels"] == "RGB" else cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise ValueError("not an image that OpenCV reads")
    height, width = how["height"], how["width"]
    if how["short_side"] is None:
        image = resize(image, height, width)
    else:
        scale = how["short_side"] / min(image.shape[:2])
        sides = [max(n, round(m * scale)) for n, m in zip((height, width), image.shape, strict=False)]
        if np.prod(sides) > 50_000_000:  # a strip of 6000 x 1 pixels would take a gigabyte
            raise ValueError("it is too long and narrow")
        image = resize(image, *sides)
        if scale < 1:  # area averaging followed by these taps is like an antialiased bilinear filter
            taps = np.array([1 - scale**2, 12 + 2 * scale**2, 1 - scale**2]) / 14
            image = cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        image = image[top : top + height, left : left + width]
    return image.reshape(height, width, -1)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Averages areas along a side that shrinks, and interpolates along one that grows."""
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    if smaller != image.shape[:2]:
        image = cv2.resize(image, smaller[::-1], interpolation=cv2.INTER_AREA)
    return image if smaller == (height, width) else cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", help="file written by `python -m hga_flax export --format=onnx`")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of classes to print (default: 5)")
    arguments = parser.parse_args()
    try:
        session = onnxruntime.InferenceSession(arguments.network, providers=onnxruntime.get_available_providers())
    except Exception as error:  # ONNX Runtime has no common exception class
        sys.exit(f"error: {arguments.network} cannot be read: {' '.join(str(error).split())}")
    known = session.get_modelmeta().custom_metadata_map
    if not {"preprocessing", "class_names"} <= known.keys():
        sys.exit(f"error: {arguments.network} does not say how to prepare its images: hga_flax did not export it")
    facts = {key: json.loads(value) for key, value in known.items()}
    failed = False
    for file in arguments.images:
        try:
            image = read_image(file, facts["preprocessing"])
        except (OSError, ValueError, cv2.error) as error:
            print(f"{file}: {error}", file=sys.stderr)
            failed = True
            continue
        (probabilities,) = session.run(["probabilities"], {"images": image[None]})[0]  # of any number of raw images
        best = (-probabilities).argsort(kind="stable")[: arguments.top]
        print(f"{file}  " + "  ".join(f"{facts['class_names'][i]} {probabilities[i]:.2%}" for i in best))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
