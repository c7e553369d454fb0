import json

import jax
import numpy as np
import pytest

from hga_flax.errors import UserError
from hga_flax.inference.export import metadata
from hga_flax.inference.from_weights import restore_weights
from hga_flax.inference.predictor import Predictor
from hga_flax.inference.to_safetensors import to_safetensors
from hga_flax.pretrained.torch_weights import torch_tensors
from tests.inference.test_export_weights import resnet18_file


def test_metadata_of_an_export_that_is_damaged_is_one_line(tmp_path):
    facts = {"class_names": "[]", "preprocessing": "{", "normalisation": "{}"}
    (tmp_path / "x.safetensors").write_bytes(to_safetensors({"conv1.weight": np.zeros(3, np.float32)}, facts))
    with pytest.raises(UserError, match=r"^--weights=.*x\.safetensors: its metadata is damaged .*; export it again$"):
        Predictor.from_weights(tmp_path / "x.safetensors", "resnet18")


@pytest.mark.medium
def test_exports_of_older_versions_and_with_notes_of_others_are_read(tmp_path):
    source = restore_weights(resnet18_file(tmp_path), "resnet18", overrides=["--config.data.image_size=32"])
    facts = {key: json.dumps(value) for key, value in metadata(Predictor(source)).items()} | {"note": "of mine {"}
    tensors = torch_tensors("resnet18", jax.tree.map(np.asarray, dict(source.variables)))
    (tmp_path / "old.safetensors").write_bytes(to_safetensors(tensors, facts))
    again = restore_weights(tmp_path / "old.safetensors", "resnet18")
    assert again.experiment.config.data.image_size == 32 and "metadata" in again.known.known
