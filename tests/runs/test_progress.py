import dataclasses
import pathlib

import pytest

from hga_flax.runs.progress import Progress, complete, planned_steps
from tests.training import tiny


def test_what_a_checkpoint_keeps_comes_back():
    kept = Progress(96, 48, {"step": 6, "top1_error": 25.0, "loss": 1.0}, 12.5, [3, 7], True)
    assert Progress.restored(dataclasses.asdict(kept)) == kept
    assert Progress.restored({}) == Progress()


def test_an_evaluation_of_no_image_is_not_the_best():
    best = {"step": 6, "top1_error": None, "loss": None}
    assert Progress.restored({"examples_seen": 96, "best": best}) == Progress(examples_seen=96)


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"), [(0, 3.0, 8), (0, 0.1, 1), (5, 3.0, 5), (0, 100.0, 250), (0, 1.0, 2)]
)
def test_training_ends_after_its_steps_or_at_the_step_nearest_to_its_epochs(steps, epochs, expected):
    assert planned_steps(tiny.config(training__steps=steps, training__epochs=epochs), 40) == expected


def test_a_run_without_steps_left_says_whether_its_plan_was_shortened():
    done, shortened = complete(pathlib.Path("runs/a"), 8, 8), complete(pathlib.Path("runs/a"), 8, 5)
    assert done == "training is complete: runs/a holds step 8 of 8"
    assert shortened.startswith("nothing to train: runs/a holds step 8, but the plan now ends at step 5; ")
    assert "--workdir" in shortened
