"""Exports a run's weights to a `.safetensors` file under the names of PyTorch libraries, and verifies the file."""

import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from hga_flax.config.loading import parse_options
from hga_flax.errors import UserError
from hga_flax.inference.predictor import Predictor
from hga_flax.inference.to_safetensors import to_safetensors
from hga_flax.pretrained.torch_files import read_torch_file
from hga_flax.pretrained.torch_names import export_peer, libraries
from hga_flax.pretrained.torch_weights import renamed, torch_model, torch_tensors

SUFFIX = ".safetensors"  # PyTorch libraries recognise the format by it


def write_weights(predictor: Predictor, file: pathlib.Path, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Writes the weights of a run to a file that ends in `SUFFIX`; returns (name, value) rows to print.

    The arrays equal the checkpoint's bit for bit; their names are those of `peer_name`.

    Args:
        predictor: predictor of the run.
        file: path to write.
        facts: metadata to store in the file as JSON values; `names` and `attention_options` are added.

    Raises:
        UserError: the weights read back from the file differ from those written.
        OSError: the file cannot be written.
    """
    config = predictor.restored.experiment.config.model
    variables = jax.tree.map(np.asarray, jax.device_get(dict(predictor.variables)))
    name = export_peer(config.name, config.attention)
    tensors = torch_tensors(name, variables)
    same_arrays = name is not None and _has_same_arrays(name, tensors, variables, predictor.image_shape[-1])
    fits = same_arrays and _is_same_network(name, tensors, predictor)
    facts = facts | {
        "names": {"network": name, "of": libraries(name) if name else [], "whole_network": fits},
        "model_options": parse_options(config.options, "model.options"),
        "attention_options": parse_options(config.attention_options, "model.attention_options"),
    }
    file.write_bytes(
        to_safetensors(tensors, {"format": "pt"} | {key: json.dumps(value) for key, value in facts.items()})
    )
    ours = flatten_dict(variables)
    found, others = renamed(name, read_torch_file(file), ours)
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if others or found.keys() != ours.keys() or not all(same(found[path], ours[path]) for path in ours):
        raise UserError("the file does not reproduce the checkpoint's weights; nothing was written")
    names = _described(name, fits, predictor)
    if same_arrays and not fits:
        names = f"those of {name}, which computes something else: this network has model.options={config.options!r}"
    return [("names", names), ("checked", f"{len(ours):,} arrays read back bit for bit")]


def _has_same_arrays(name: str, tensors: dict[str, np.ndarray], variables: dict[str, Any], channels: int) -> bool:
    """Returns whether the peer `name` has exactly these arrays, with these shapes."""
    model, images = torch_model(name, tensors), jnp.zeros((1, 64, 64, channels))
    shapes = flatten_dict(dict(jax.eval_shape(model.init, jax.random.key(0), images)))
    return {path: a.shape for path, a in shapes.items()} == {p: a.shape for p, a in flatten_dict(variables).items()}


def _is_same_network(name: str, tensors: dict[str, np.ndarray], predictor: Predictor) -> bool:
    """Returns whether the peer `name` computes the same: options such as `average_down` change no array's shape."""
    peer, network = torch_model(name, tensors), predictor.restored.experiment.model
    images = jnp.zeros((1, 64, 64, predictor.image_shape[-1]))
    # As text without the addresses of functions.
    program = lambda model: re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(model.apply)(predictor.variables, images)))
    return program(peer) == program(network.clone(dtype=peer.dtype))


def _described(name: str | None, fits: bool, predictor: Predictor) -> str:
    config = predictor.restored.experiment.config.model
    if name is None:
        return f"this project's own: neither torchvision nor timm has {config.name}"
    # timm's VGGs name the layers of the head differently.
    owners = [library for library in libraries(name) if not (library == "timm" and name.startswith("vgg"))]
    owner = " and ".join(f"{library}'s" for library in owners)
    if not fits:
        what = f"attention '{config.attention}'" if config.attention != "none" else "the rest"
        return f"{owner} {name} where it has the layer; {what} as described in docs/practice.md"
    classes, channels = len(predictor.class_names), predictor.image_shape[-1]
    if "timm" not in owners:
        more = ""
        if name == "googlenet":
            more = f", aux_logits={predictor.restored.experiment.model.aux_logits}, init_weights=False"
        call = f": torchvision.models.{name}(num_classes={classes}{more})"
        return f"{owner} {name}{call if channels == 3 else ''}"  # torchvision's take no other channels
    return f"{owner} {name}: timm.create_model('{name}', num_classes={classes}, in_chans={channels})"
