"""The first losses of three small runs, which no change may move without saying so.

    python -m tests.golden_losses            compares them with tests/golden/losses.json
    python -m tests.golden_losses --write    writes that file anew, for a change that is marked "results may change"

They fix what a seed means: the initial parameters, the order of the examples, augmentation, erasing, mixing and
dropout, the optimizers, the losses and the schedule. Data are synthetic, so that nothing is downloaded.
"""

import argparse
import json
import os
import pathlib
import sys

import jax
import numpy as np

from hga_flax.data.sources import DatasetInfo
from hga_flax.processes.mesh import to_devices
from hga_flax.training.experiment import create_experiment, prepare
from hga_flax.training.state import create_state
from hga_flax.training.step import make_train_step
from tests.training import tiny

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # as tiny.config needs it, where pytest has not set it
FILE = pathlib.Path(__file__).parent / "golden" / "losses.json"
STEPS = 20
TOLERANCE = 1e-4  # relative, of each loss; see tests/golden/README.md
RUNS = {
    # Post-activation ResNet with HGA, momentum, a cosine with warm-up, shifts, mirroring and rotation on the device.
    "cifar_resnet8-hga-sgd": {
        "schedule__name": "cosine", "schedule__warmup_steps": 5, "optimizer__nesterov": True,
    },
    # Bottlenecks with SE, LAMB, binary cross-entropy on mixed and erased images, accumulated, crops on the host.
    "resnet50-se-lamb": {
        "seed": 3, "model__name": "resnet50", "model__options": "stage_sizes=(1, 1), features=8",
        "model__attention": "se", "data__image_size": 32, "data__augmentation": "imagenet", "data__crop_padding": 0,
        "data__rotation_degrees": 10.0, "data__mixup": 0.2, "data__cutmix": 1.0, "data__random_erasing": 0.25,
        "training__loss": "binary_cross_entropy", "training__accumulation_steps": 2, "optimizer__name": "lamb",
        "optimizer__learning_rate": 0.005, "optimizer__clip_norm": 1.0, "schedule__name": "step",
        "schedule__decay_at_steps": (10,),
    },
    # Pre-activation blocks with ECA, AdamW, smoothed labels and stochastic depth, images as they are.
    "cifar_preact_resnet8-eca-adamw": {
        "seed": 2, "model__name": "cifar_preact_resnet8", "model__options": "features=4, stochastic_depth=0.3",
        "model__attention": "eca", "data__augmentation": "none", "data__crop_padding": 0,
        "training__label_smoothing": 0.1, "training__ema_decay": 0.9, "optimizer__name": "adamw",
        "optimizer__learning_rate": 0.003, "optimizer__weight_decay": 0.05,
    },
}  # fmt: skip
ONE_DEVICE = {"cifar_preact_resnet8-eca-adamw"}  # devices draw stochastic depth of their own


def losses(name: str, devices: int = 1) -> list[float]:
    """Returns the mean losses of a run's first `STEPS` batches on so many devices."""
    config = tiny.config(**RUNS[name], training__steps=STEPS)
    experiment = create_experiment(config, DatasetInfo("digits", 10, 1, ()), mesh=tiny.mesh(devices))
    prepared = prepare(experiment)
    state = create_state(prepared.init, config.seed, experiment.mesh)
    step = make_train_step(experiment.model, experiment.optimizer(prepared.schedule), config, experiment.mesh)
    source = experiment.dataset.source(config.data.train_split)
    batches = experiment.dataset.train_batches(source, config.training.batch_size, experiment.shard)
    made = []
    for _, batch in zip(range(STEPS), to_devices(batches, experiment.mesh), strict=False):
        state, report = step(state, batch)
        made.append(float(report.loss))
    return made


def difference(name: str, devices: int = 1) -> float:
    """Returns the largest relative difference of a run's losses from the golden ones."""
    golden = np.asarray(json.loads(FILE.read_text())[name])
    return float(np.max(np.abs(np.asarray(losses(name, devices)) - golden) / np.abs(golden)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden_losses", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the file anew")
    if parser.parse_args().write:
        made = {name: [float(f"{loss:.7g}") for loss in losses(name)] for name in RUNS}
        rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(values)}" for name, values in made.items())
        FILE.write_text(f"{{\n{rows}\n}}\n")
        return 0
    worst = 0.0
    for name in RUNS:
        for devices in (1,) if name in ONE_DEVICE else (1, 2, 4):
            if devices <= jax.device_count():
                worst = max(worst, found := difference(name, devices))
                print(f"{name:<32} {devices} device(s): {found:.1e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
