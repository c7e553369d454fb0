"""Reads a checkpoint of `train.py` in Python: the network with its parameters, logits of images, and HGA's gates.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python -m examples.read_checkpoint runs/digits [--checkpoint=best|latest|STEP] [--images=8]

prints the checkpoint's step and largest parameters, the predicted classes of the first images of the
evaluation split, and the mean gate of each block with gates.
"""

import argparse

import jax
import numpy as np

from hga_flax import restore_workdir
from hga_flax.config.command_line import add_import_flag
from hga_flax.errors import UserError, run_main
from hga_flax.images.device_augmentation import normalize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="folder of a run")
    parser.add_argument("--checkpoint", default="latest", help="best, latest (the default) or a step")
    parser.add_argument("--images", type=int, default=8, help="number of images from the evaluation split (default: 8)")
    add_import_flag(parser)  # for attentions of one's own
    arguments = parser.parse_args()
    if arguments.images < 1:
        raise UserError(f"--images={arguments.images}: must be at least 1")

    restored = restore_workdir(arguments.workdir, arguments.checkpoint)
    model, config, dataset = restored.experiment.model, restored.experiment.config, restored.experiment.dataset
    variables = restored.variables  # those of the moving average if the run keeps one
    leaves = jax.tree.leaves_with_path(variables["params"])
    print(f"step {restored.step} of {config.model.name}, attention {config.model.attention}")
    print(f"{sum(leaf.size for _, leaf in leaves):,} parameters, the largest:")
    for path, leaf in sorted(leaves, key=lambda pair: -pair[1].size)[:3]:
        print(f"  {jax.tree_util.keystr(path, simple=True, separator='/')} {list(leaf.shape)}")

    source = dataset.source(config.data.eval_split, train=False)
    batches = dataset.eval_batches(source, arguments.images, restored.experiment.shard)
    batch = next(iter(batches))  # image uint8 [B, H, W, C], label [B], mask [B]
    images = normalize(batch["image"], config.data.mean, config.data.std)  # as in training
    logits, sown = jax.jit(lambda *inputs: model.apply(*inputs, mutable=["intermediates"]))(variables, images)
    names = dataset.info.class_names or [str(label) for label in range(dataset.info.num_classes)]
    for label, row, good in zip(batch["label"], jax.nn.softmax(logits), batch["mask"], strict=True):
        if good:  # else padding, or an image that cannot be decoded
            print(f"a {names[label]} is classified as a {names[int(row.argmax())]} ({100 * row.max():.1f} %)")

    for block, inner in sown.get("intermediates", {}).items():
        for gate in inner.get("attention", {}).get("gate", ()):  # [B, channels]
            print(f"gates of {block}: mean {np.mean(gate):.3f}, from {np.min(gate):.3f} to {np.max(gate):.3f}")


if __name__ == "__main__":
    run_main(main)
