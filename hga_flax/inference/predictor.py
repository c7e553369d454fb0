"""Predicts labels of images with a restored network; reads, decodes and normalises images as evaluation does."""

import concurrent.futures
import glob
import io
import itertools
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TextIO

import jax
import numpy as np
from ml_collections import ConfigDict

from hga_flax.data.pipeline import available_cores
from hga_flax.images.bad_images import BadImage
from hga_flax.images.host_augmentation import host_transform
from hga_flax.images.image_files import SUFFIXES, Endings, images_below, read_image
from hga_flax.images.jpeg import ORIENTATION, UPRIGHT
from hga_flax.processes.mesh import replicate, to_devices
from hga_flax.training.evaluation import apply_network
from hga_flax.training.restore import Restored, restore_workdir
from hga_flax.training.step import REPLICATED, SPLIT

Image = str | os.PathLike | bytes | np.ndarray  # a file name, an encoded image, or uint8 [H, W, C]


class Predictor:
    """Labels images with a trained network; see `from_workdir` and `from_weights`.

    Args:
        restored: a restored network, from `restore_workdir`.

    Attributes:
        restored: the restored network.
        variables: the network's weights, as `restored.experiment.model.apply` takes them.
        class_names: names of the classes, in the order of the probabilities.
        batch_size: maximum number of images per batch.
        image_shape: (height, width, channels) of the network's input.

    Examples:
        >>> predictor = Predictor.from_workdir("runs/digits")  # doctest: +SKIP
        >>> predictor.class_names[predictor.predict("digit.png")[0].argmax()]  # doctest: +SKIP
        '3'
    """

    def __init__(self, restored: Restored):
        experiment = restored.experiment
        info, config = experiment.dataset.info, experiment.config
        self.restored = restored
        self.variables = restored.variables
        self.class_names = info.class_names or tuple(map(str, range(info.num_classes)))
        self.batch_size = experiment.eval_batch_size
        self._channels = info.channels
        self._transform = host_transform(
            config.data, info.channels, train=False, seed=config.seed, size=config.evaluation.image_size
        )
        self.image_shape = self.load(np.zeros((8, 8, info.channels), np.uint8)).shape
        self._threads = max(1, min(config.data.num_threads, available_cores()))

        def step(variables: Any, images: jax.Array) -> jax.Array:
            return jax.nn.softmax(apply_network(experiment.model, config.data, variables, images))

        specs = (REPLICATED, SPLIT)
        self._step = jax.jit(jax.shard_map(step, mesh=experiment.mesh, in_specs=specs, out_specs=SPLIT))

    @classmethod
    def from_workdir(
        cls,
        path: str | os.PathLike[str],
        checkpoint: str | int = "best",
        data_dir: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
        weights: str | None = None,
    ) -> "Predictor":
        """Restores a run's network; does not need the data set that it was trained on.

        Args:
            path: the workdir.
            checkpoint: "best" (lowest top-1 error), "latest" or a step.
            data_dir: folder of the data set; None for the run's.
            batch_size: maximum number of images per batch; None for the run's evaluation batch size.
            weights: "ema" or "raw"; None for the moving average if the run keeps one.

        Raises:
            UserError: there is no such run or checkpoint, or it cannot be read.
        """
        return cls(restore_workdir(path, checkpoint, data_dir, batch_size, weights))

    @classmethod
    def from_weights(
        cls,
        weights: str | os.PathLike[str],
        model: str = "",
        attention: str = "",
        config: str | os.PathLike[str] | ConfigDict | None = None,
        overrides: Collection[str] = (),
        batch_size: int | None = None,
    ) -> "Predictor":
        """Restores a network from a file of weights, without a run, with the preprocessing known for the weights.

        Args:
            weights: file from torchvision, timm or a public CIFAR program, or a run's folder.
            model: name of the network, such as "resnet50".
            attention: name of the network's attention; "" for the one that `model` implies, or the configured one.
            config: file or configuration, if `model` is not enough.
            overrides: arguments such as "--config.data.mean=0.5,0.5,0.5"; they override the known preprocessing.
            batch_size: maximum number of images per batch.

        Raises:
            UserError: the weights cannot be read, or belong to another network.

        Examples:
            >>> Predictor.from_weights("resnet50-0676ba61.pth", "resnet50").class_names[0]  # doctest: +SKIP
            'tench'
        """
        from hga_flax.inference.from_weights import restore_weights

        return cls(restore_weights(weights, model, attention, config, overrides, batch_size=batch_size))

    def predict(self, images: Image | Iterable[Image]) -> np.ndarray:
        """Returns the probabilities of the classes, float32 `[N, classes]`.

        Args:
            images: file names, encoded images as bytes, or uint8 arrays `[H, W, C]` of any size; or one of these.

        Raises:
            BadImage: an image cannot be read or decoded; a UserError that names the file, or the image by its index.
                (`stream` continues with the next image instead.)
        """
        rows = []
        for image, row in self.stream(images):
            if isinstance(row, BadImage):
                name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {len(rows)} (from 0)"
                raise BadImage(f"{name}: {row}")
            rows.append(row)
        return np.stack(rows) if rows else np.zeros((0, len(self.class_names)), np.float32)

    def stream(self, images: Image | Iterable[Image]) -> Iterator[tuple[Image, np.ndarray | BadImage]]:
        """Yields each image in order, with its probabilities, float32 `[classes]`, or the `BadImage` error.

        Keeps at most three batches of images in memory, however many there are.
        """
        images = iter([images] if _is_one(images) else images)
        first = list(itertools.islice(images, self.batch_size))
        # Use smaller batches for few images, with power-of-two sizes to limit the number of compilations.
        mesh = self.restored.experiment.mesh
        devices = mesh.devices.size
        size = min(self.batch_size, -(-(1 << max(0, len(first) - 1).bit_length()) // devices) * devices)
        chunks = _chunks(itertools.chain(first, images), size)
        loaded: deque[tuple[list[Image], list[np.ndarray | BadImage]]] = deque()

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for names, pixels in self._loaded(chunks):
                loaded.append((names, pixels))
                batch = np.zeros((size, *self.image_shape), np.uint8)
                for row, image in enumerate(pixels):
                    if not isinstance(image, BadImage):
                        batch[row] = image
                yield {"image": batch}

        variables = replicate(self.variables, mesh)
        for batch in to_devices(batches(), mesh):
            with jax.set_mesh(mesh):  # whatever mesh the caller has set
                rows = np.asarray(self._step(variables, batch["image"]))
            names, pixels = loaded.popleft()
            for name, image, row in zip(names, pixels, rows, strict=False):  # drops the padding rows
                yield name, image if isinstance(image, BadImage) else row

    def _loaded(self, chunks: Iterator[list[Image]]) -> Iterator[tuple[list[Image], list[np.ndarray | BadImage]]]:
        """Yields chunks with their pixels; threads load one chunk ahead."""
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            ahead = None
            for chunk in chunks:
                loading = chunk, [pool.submit(self._try, image) for image in chunk]
                if ahead is not None:
                    yield ahead[0], [future.result() for future in ahead[1]]
                ahead = loading
            if ahead is not None:
                yield ahead[0], [future.result() for future in ahead[1]]

    def _try(self, image: Image) -> np.ndarray | BadImage:
        try:
            return self.load(image)
        except BadImage as error:
            return error

    def load(self, image: Image) -> np.ndarray:
        """Reads, decodes and crops an image as evaluation does; returns uint8 of shape `image_shape`.

        Raises:
            BadImage: the image cannot be read or decoded.
        """
        if _is_array(image):
            _check_picture(image)
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != self._channels or not image.size:
                raise BadImage(f"an array {image.dtype} {list(image.shape)} is not uint8 [H, W, {self._channels}]")
        elif isinstance(image, str | os.PathLike):
            image = _read(image)
        elif not isinstance(image, bytes):
            raise BadImage(f"{type(image).__name__} is not a file name, an encoded image (bytes) or an array")
        return self._transform(image, 0, 0)


def _check_picture(image: Any) -> None:
    """Raises a BadImage for an image of Pillow's whose pixels alone say the wrong thing."""
    if not hasattr(image, "getexif"):
        return
    if image.mode not in ("RGB", "L"):
        raise BadImage(f"an image of Pillow's in mode {image.mode}: convert it to RGB first")
    if image.getexif().get(ORIENTATION, UPRIGHT) not in (0, UPRIGHT):
        raise BadImage("an image of Pillow's that its EXIF data turn: use PIL.ImageOps.exif_transpose first")


def _is_array(image: Any) -> bool:
    """Returns whether NumPy takes it as an array, such as JAX's arrays and Pillow's images."""
    return hasattr(image, "__array__") or hasattr(image, "__array_interface__")


def _is_one(images: Image | Iterable[Image]) -> bool:
    is_array = _is_array(images) and np.ndim(images) in (2, 3)
    return isinstance(images, str | os.PathLike | bytes) or is_array or not isinstance(images, Iterable)


def _read(file: str | os.PathLike) -> bytes:
    try:
        return read_image(file)
    except IsADirectoryError:  # commands name the images in a folder themselves
        some = next(images_below(file), None)
        without = f"a folder without images ({', '.join(SUFFIXES)})"
        raise BadImage(without if some is None else f"a folder; name the images in it, such as {some}") from None
    except FileNotFoundError as error:
        pattern = os.fsdecode(file)
        if glob.has_magic(pattern):
            some = next(glob.iglob(pattern, recursive=True), None)
            without = "no file matches this pattern"
            raise BadImage(without if some is None else f"a pattern; name the files, such as {some}") from None
        raise BadImage(error.strerror) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BadImage(getattr(error, "strerror", None) or str(error)) from None


def _chunks(items: Iterator[Image], size: int) -> Iterator[list[Image]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def find_images(arguments: Iterable[str], listing: TextIO, ignored: Endings | None = None) -> Iterator[str]:
    """Yields the names of the files that arguments refer to, without opening them.

    Args:
        arguments: files, patterns (`*`, `?`, `[...]`, and `**` for nested folders), folders (all images below,
            sorted, without hidden ones), or "-" for a list of these, one per line.
        listing: stream that "-" reads.
        ignored: counts the files in folders whose endings are not image endings (see `images_below`).

    Yields:
        File names. An argument that matches no file is yielded unchanged, so that opening it reports the error.
    """
    for argument in arguments:
        if argument == "-":
            if isinstance(listing, io.TextIOWrapper):
                listing.reconfigure(errors="surrogateescape")  # a file name need not be valid UTF-8
            yield from find_images(
                (name for line in listing if (name := line.rstrip("\r\n")) not in ("", "-")), listing, ignored
            )
            continue
        path = os.path.expanduser(argument)
        matches = [path] if os.path.exists(path) else sorted(glob.iglob(path, recursive=True))
        found = False
        for match in matches:
            for file in images_below(match, ignored) if os.path.isdir(match) else [match]:
                found = True
                yield file
        if not found:
            yield path
