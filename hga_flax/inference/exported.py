"""Reads what `export --format=safetensors` has written about a network into the metadata of its file."""

import json
import pathlib
from typing import Any, NamedTuple

from hga_flax.errors import UserError, one_line
from hga_flax.pretrained.preprocessing import Preprocessing
from hga_flax.pretrained.torch_files import read_metadata

KEPT = ("class_names", "preprocessing", "normalisation", "source", "model_options", "attention_options")


class Exported(NamedTuple):
    """What `export --format=safetensors` writes into a file."""

    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    network: tuple[str, str]  # our names of the network and its attention
    options: dict[str, dict[str, Any]]  # by key of config.model
    step: int | None


def read_exported(path: pathlib.Path) -> Exported | None:
    """Returns what this project's export wrote into a file of weights; None for files of others.

    Raises:
        UserError: it is damaged.
    """
    metadata = read_metadata(path)
    if not {"class_names", "preprocessing", "normalisation"} <= metadata.keys():
        return None
    try:
        facts = {key: json.loads(metadata[key]) for key in KEPT if key in metadata}
        images, values, source = facts["preprocessing"], facts["normalisation"], facts["source"]
        return Exported(
            tuple(map(str, facts["class_names"])),
            Preprocessing(
                "the file's metadata, written by export",
                int(images["height"]),
                float(images["crop_fraction"] or 0),
                "by area",
                tuple(map(float, values["mean"])),
                tuple(map(float, values["std"])),
            ),
            (str(source["model"]), str(source["attention"])),
            {key: dict(facts[key]) for key in KEPT[-2:] if key in facts},  # older versions wrote none
            source.get("step"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--weights={path}: its metadata is damaged ({one_line(error)}); export it again") from None
