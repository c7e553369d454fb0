import json

import pytest

from tests import golden_losses
from tests.golden_losses import FILE, ONE_DEVICE, RUNS, STEPS, TOLERANCE, difference

MEDIUM = "resnet50-se-lamb"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.medium) if name == MEDIUM else name for name in RUNS]
)
def test_the_first_losses_of_a_run_are_the_committed_ones(name):
    assert difference(name, 1 if name in ONE_DEVICE else 2) < TOLERANCE


def test_a_moved_loss_would_be_noticed(monkeypatch):
    golden = json.loads(FILE.read_text())
    assert list(golden) == list(RUNS) and all(len(values) == STEPS for values in golden.values())
    name = next(iter(RUNS))
    moved = [*golden[name][:-1], golden[name][-1] * (1 + 3 * TOLERANCE)]
    monkeypatch.setattr(golden_losses, "losses", lambda name, devices=1: moved)
    assert difference(name) > TOLERANCE
