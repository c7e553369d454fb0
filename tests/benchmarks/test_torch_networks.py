import importlib.util
import json

import jax
import numpy as np
import pytest

from hga_flax.__main__ import main
from hga_flax.attention import HGA
from hga_flax.errors import UserError

HAVE_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed")


@pytest.mark.skipif(HAVE_TORCH, reason="torch is installed")
def test_without_torch_one_line_says_what_to_install():
    with pytest.raises(UserError, match="pip install torch timm"):
        main(["bench", "step", "--vs-torch"])


@needs_torch
def test_hga_as_one_writes_it_in_pytorch_is_ours():
    import torch

    from benchmarks.torch_networks import HierarchicalGlobalAttention

    theirs, x = HierarchicalGlobalAttention(64), np.random.RandomState(0).standard_normal((2, 64, 9, 6))
    weight = lambda tensor: tensor.detach().numpy()
    params = {
        "reduce": {"kernel": weight(theirs.reduce.weight)[:, :, 0, 0].T},
        "restore": {"kernel": weight(theirs.restore.weight).T},
        "mfe": {f"kernel_{2 * i + 1}": weight(s.weight).transpose(2, 3, 1, 0) for i, s in enumerate(theirs.scales)},
        "ee": {
            # PyTorch's inputs run through the cells of a channel first.
            "suppress": weight(theirs.suppress.weight).T.reshape(21, 32, 8),
            "excite": weight(theirs.excite.weight).T,
        },
    }
    ours = jax.jit(HGA(64).apply)({"params": params}, x.transpose(0, 2, 3, 1).astype(np.float32))
    expected = theirs(torch.from_numpy(x).float()).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


@needs_torch
def test_its_networks_have_the_sizes_of_ours():
    from benchmarks.torch_networks import ResNet

    sizes = {name: sum(p.numel() for p in ResNet(name).parameters()) for name in ("none", "se", "hga")}
    assert sizes == {"none": 25_557_032, "se": 28_088_024, "hga": 26_656_808}


@needs_torch
def test_without_a_counterpart_nothing_is_compiled():
    with pytest.raises(UserError, match=r"only resnet50.* have PyTorch counterparts"):
        main(["bench", "step", "--models=cifar_resnet8:none", "--vs-torch"])


@pytest.mark.slow
@needs_torch
def test_pytorchs_networks_take_turns_with_ours(capsys):
    main(["bench", "step", "--models=resnet50:hga", "--batch=2", "--image-size=32", "--steps=1", "--vs-torch",
          "--json"])  # fmt: skip
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["model"] == "resnet50" and rows[-1]["attention"] == "hga"
    assert rows[-1]["model"] == "torch resnet50" and rows[-1]["params"] == rows[0]["params"]
    assert all(row["step_ms"] > 0 for row in rows)
