"""`python -m hga_flax prepare`: writes data sets as array_record files, once.

    prepare NAME               a TFDS data set, for example imagenet2012, cifar10, fashion_mnist
    prepare folder DIR         a folder of images, train/CLASS/ and val/CLASS/
    prepare arrays FILE.npz    labelled arrays
    prepare idx DIR            MNIST-style IDX files

A data set gets its name when it is complete, so if the command was killed, simply repeat it.
"""

import argparse
import functools
import importlib.util
import os
import pathlib
import shlex
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from hga_flax.data.arrays import LabelledArrays, read_idx, read_npz
from hga_flax.data.folder import FolderSource, class_names, packable_splits
from hga_flax.data.remote import copies_of, find_set, upload
from hga_flax.data.sources import base_name, data_directory, open_builder
from hga_flax.errors import UserError, called, expand, one_line
from hga_flax.images.bad_images import BadImage
from hga_flax.storage.buckets import Remote, is_remote

Deliver = Callable[[pathlib.Path], None]  # uploads a prepared folder, if it belongs into a bucket
BAD_SHOWN = 20  # most undecodable images listed
LOCAL = ("folder", "arrays", "idx")
# Debian's package dataset-fashion-mnist; its files hold the same images as TFDS's, compressed differently.
FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
# The two files of imagenet2012 and their sizes in bytes.
IMAGENET_EXAMPLES = {"train": 1_281_167, "validation": 50_000}
DAMAGED = tarfile.TarError | zipfile.BadZipFile | zlib.error | EOFError  # what reading an archive may raise
IMAGENET = {"ILSVRC2012_img_train.tar": 147_897_477_120, "ILSVRC2012_img_val.tar": 6_744_924_160}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "dataset", metavar="NAME", help="name of a TFDS data set, or: folder DIR, arrays FILE.npz, idx DIR"
    )
    parser.add_argument("path", nargs="?", help="input of folder, arrays and idx")
    parser.add_argument("--name", help="folder, arrays, idx: name of the new data set (default: from the path)")
    parser.add_argument("--class-names", default="", help="arrays, idx: class names, separated by commas")
    parser.add_argument("--data-dir", default="", help="folder of TFDS data sets (default: as for data.dir)")
    parser.add_argument(
        "--manual-dir",
        default="",
        help="folder of archives that must be downloaded by hand (default: DATA_DIR/downloads/manual)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Prepares the data set and prints its folder.

    Raises:
        UserError: something is missing that the user can provide.
    """
    given = arguments.data_dir or os.environ.get("TFDS_DATA_DIR", "")
    bucket = Remote(given, "--data-dir") if is_remote(given) else None
    data_dir = copies_of(bucket.address) if bucket else data_directory(given).absolute()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # TFDS's bars would fill a log; tqdm reads this on import

    def deliver(folder: pathlib.Path) -> None:
        if bucket:
            upload(folder, bucket.below(folder.relative_to(data_dir).as_posix()))

    if arguments.dataset in LOCAL:
        name, folder = _prepare_local(arguments, data_dir, bucket, deliver)
        usage = f"--config.data.name={name}"
    else:
        if arguments.path or arguments.name or arguments.class_names:
            raise UserError(f"prepare {arguments.dataset}: PATH, --name and --class-names are for {', '.join(LOCAL)}")
        manual = expand(arguments.manual_dir, "--manual-dir").absolute() if arguments.manual_dir else None
        if bucket and (found := find_set(bucket, arguments.dataset)):
            print(f"{arguments.dataset} is already prepared:")
            folder = data_dir / base_name(arguments.dataset) / found.folder
        else:
            folder = _prepare_tfds(arguments.dataset, data_dir, manual, deliver)
        usage = f"--config.data.name={arguments.dataset}"
    flag = f" --config.data.dir={data_dir}" if arguments.data_dir else ""
    print(called(f"{folder}\nuse it with {usage}{flag}"))


def _prepare_local(
    arguments: argparse.Namespace, data_dir: pathlib.Path, bucket: Remote | None, deliver: Deliver
) -> tuple[str, pathlib.Path]:
    """Packs a folder of images, an .npz file or IDX files; delivers the folder before another command may pack it."""
    from hga_flax.data import packing

    kind = arguments.dataset
    if arguments.manual_dir:
        raise UserError(f"prepare {kind}: --manual-dir is for TFDS data sets; leave it out")
    if not arguments.path:
        raise UserError(f"prepare {kind}: name the {'file' if kind == 'arrays' else 'folder'} too")
    path = expand(arguments.path, "PATH").absolute()
    if not os.path.exists(path):  # pathlib's raises for a name that is too long
        raise UserError(f"prepare {kind}: {path} does not exist")
    if kind == "folder" and data_dir.resolve().is_relative_to(path.resolve()):
        raise UserError(f"prepare folder: --data-dir={data_dir} is inside the folder to pack; choose another")
    name = packing.check_name(arguments.name or path.stem.lower().replace("-", "_"))
    there = find_set(bucket, name) if bucket else (data_dir / name / packing.VERSION).exists()
    if there:
        raise UserError(f"{data_dir / name} already exists; choose another --name or remove it")
    names = tuple(n.strip() for n in arguments.class_names.split(",")) if arguments.class_names else ()
    if kind == "folder" and names:
        raise UserError("prepare folder: the folders name the classes; --class-names is for arrays and idx")
    sources = {split: FolderSource(path, split) for split in packable_splits(path)} if kind == "folder" else {}
    with packing.locked(data_dir, name):
        if bucket:
            stale = data_dir / name / packing.VERSION  # the bucket lacks the set
            shutil.rmtree(stale, ignore_errors=True)
        if kind == "folder":
            bad: dict[str, str] = {}
            examples = {split: functools.partial(_checked, source, bad) for split, source in sources.items()}
            shape = (None, None, 3)
            folder = packing.pack(name, examples, class_names(path), shape, data_dir, file_names=True)
            _say_bad(bad, sum(len(source) for source in sources.values()))
        else:
            arrays = (read_npz if kind == "arrays" else read_idx)(path, names)
            folder = _pack_arrays(name, arrays, data_dir, packing.VERSION)
        deliver(folder)
        return name, folder


def _checked(source: FolderSource, bad: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a folder's examples, and records in `bad` which cannot be decoded and why."""
    from hga_flax.images.decoding import decode

    for name, example in source.examples():
        try:
            jpeg = example["image"][:2] == b"\xff\xd8"  # reduced, every byte is still read, in half the time
            decode(example["image"], 3, reduction=8 if jpeg else 1)
        except BadImage as error:
            bad[name] = str(error)
        yield name, example


def _say_bad(bad: dict[str, str], images: int) -> None:
    for name, reason in list(bad.items())[:BAD_SHOWN]:
        print(f"warning: {name}: {reason}", file=sys.stderr)
    if bad:
        more = f" ({len(bad) - BAD_SHOWN:,} of them not listed)" if len(bad) > BAD_SHOWN else ""
        print(
            f"warning: {len(bad):,} of {images:,} images cannot be decoded{more}; they are packed too, and training "
            "skips up to data.max_bad_images of them per split",
            file=sys.stderr,
        )


def _pack_arrays(name: str, arrays: LabelledArrays, data_dir: pathlib.Path, version: str) -> pathlib.Path:
    from hga_flax.data import packing

    examples = {split: lambda split=split: arrays.examples(split) for split in arrays.splits}
    return packing.pack(name, examples, arrays.class_names, arrays.shape, data_dir, version)


def _prepare_tfds(name: str, data_dir: pathlib.Path, manual: pathlib.Path | None, deliver: Deliver) -> pathlib.Path:
    """Prepares a TFDS data set, delivers its folder while no other command may prepare it, and returns the folder."""
    from hga_flax.data import packing
    from hga_flax.data.packing import tfds

    builder = open_builder(name, str(data_dir), "prepare", known=LOCAL)
    if builder.info.splits:
        print(f"{name} is already prepared:")
        folder = pathlib.Path(builder.data_dir)
        deliver(folder)
        return folder
    if builder.name == "fashion_mnist" and (manual or FASHION_MNIST).is_dir():
        labels = builder.info.features["label"].names
        arrays = read_idx(manual or FASHION_MNIST, tuple(labels))
        with packing.locked(data_dir, builder.name):
            folder = _pack_arrays(builder.name, arrays, data_dir, str(builder.version))
            deliver(folder)
            return folder
    if builder.name == "imagenet2012":
        check_imagenet_tars(data_dir, manual or data_dir / "downloads" / "manual", bool(manual))
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"preparing {name} needs TensorFlow, for this one step: pip install tensorflow, run the same command "
            "again, pip uninstall tensorflow; training does not need it"
        )
    with packing.locked(data_dir, builder.name):
        options = tfds.download.DownloadConfig(manual_dir=str(manual) if manual else None)
        try:
            with packing.full_disk_as_os_error():
                builder.download_and_prepare(download_config=options)
        except Exception as error:
            expected = type(error).__module__.split(".")[0] in ("requests", "urllib3", "tensorflow_datasets")
            if not expected and not isinstance(error, OSError | AssertionError | DAMAGED):
                raise
            more = "; an archive is damaged or incomplete: get it again" if isinstance(error, DAMAGED) else ""
            raise UserError(f"preparing {name} failed: {type(error).__name__}: {one_line(error)}{more}") from None
        folder = pathlib.Path(builder.data_dir)
        deliver(folder)
    if builder.name == "imagenet2012":
        for split, size in IMAGENET_EXAMPLES.items():
            if (found := builder.info.splits[split].num_examples) != size:
                line = f"{split} has {found:,} examples, the official one {size:,}; are the archives complete?"
                print(f"warning: {line}", file=sys.stderr)
    return folder


def check_imagenet_tars(data_dir: pathlib.Path, folder: pathlib.Path, named: bool) -> None:
    """Checks that ImageNet's two files are there, before hours of work begin.

    Raises:
        UserError: a file is missing; the message says what is needed, where, and how to continue.
    """
    missing = [name for name in IMAGENET if not (folder / name).is_file()]
    if missing:
        sizes = " and ".join(f"{name} ({size:,} bytes)" for name, size in IMAGENET.items())
        flags = [f"--data-dir={data_dir}", *([f"--manual-dir={folder}"] if named else [])]
        raise UserError(
            f"imagenet2012 is made of {sizes}, which image-net.org gives to registered users; missing in {folder}: "
            f"{', '.join(missing)}. Put them there, then: "
            f"python -m hga_flax prepare imagenet2012 {shlex.join(flags)}"
        )
    for name, size in IMAGENET.items():
        there = (folder / name).stat().st_size
        if there != size:
            print(f"warning: {folder / name} has {there:,} bytes, the official file {size:,}; is it complete?")
