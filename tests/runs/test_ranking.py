import contextlib
import types

from hga_flax.errors import UserError
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.manifest import UnreadableCheckpoint
from hga_flax.runs.ranking import Evaluations, LatestAndBest, comparable, rank
from tests.runs.test_checkpoints import metrics, state


def test_fewer_errors_rank_first_then_less_loss_and_what_is_no_number_last():
    tries = [(50.0, None), (10.0, 2.0), (10.0, float("nan")), (10.0, 1.0), (0.0, None)]
    ranked = sorted(({"top1_error": error, "loss": loss} for error, loss in tries), key=rank)
    assert [(m["top1_error"], m["loss"]) for m in ranked[:3]] == [(0.0, None), (10.0, 1.0), (10.0, 2.0)]
    assert ranked[-1]["top1_error"] == 50.0


def test_the_latest_and_the_best_of_the_evaluated_are_preserved():
    errors = {1: 30.0, 2: 10.0, 3: 20.0, 4: None, 5: None}
    evaluations = Evaluations(lambda step: errors[step] and metrics(errors[step]), print)
    checkpoints = [types.SimpleNamespace(step=step) for step in errors]
    preserved = lambda policy: [c.step for c, kept in zip(checkpoints, ask(policy), strict=True) if kept]
    ask = lambda policy: policy.should_preserve(checkpoints, context=None)
    assert preserved(LatestAndBest(2, evaluations)) == [2, 4, 5]
    dropped = []
    assert preserved(LatestAndBest(1, Evaluations(lambda step: None, print), dropped.append)) == [5]
    assert dropped == [1, 2, 3, 4]


def test_evaluations_of_other_images_are_not_compared():
    on = metrics(0.0) | {"split": "val", "split_size": 5, "split_digest": "a"}
    for change in ({"split": "test"}, {"split_size": 6}, {"split_digest": "b"}):
        assert list(comparable({1: on, 2: on | {"top1_error": 9.0} | change})) == [2]
    assert list(comparable({1: metrics(0.0), 2: on})) == [1, 2]  # an older version's does not say


def test_what_cannot_be_read_is_said_once_and_kept_while_it_may_be_read_later():
    errors = {1: UnreadableCheckpoint("1 is damaged"), 2: UserError("2 is away"), 3: None}

    def read(step):
        reads.append(step)
        if error := errors[step]:
            raise error
        return metrics(5.0)

    reads, said = [], []
    evaluations = Evaluations(read, said.append)
    assert [evaluations[step] for step in (1, 2, 3)] == [None, None, metrics(5.0)] and evaluations.unknown == {2}
    checkpoints = [types.SimpleNamespace(step=step) for step in (1, 2, 3, 4)]
    evaluations[4] = metrics(9.0)
    assert LatestAndBest(1, evaluations).should_preserve(checkpoints, context=None) == [False, True, True, True]
    assert evaluations.best_first([1, 2, 3, 4]) == [3, 4]
    assert said == [f"warning: {errors[step]}; its evaluation is not known" for step in (1, 2)]
    errors[2] = None
    assert evaluations[2] == metrics(5.0) and not evaluations.unknown
    assert reads == [1, 2, 3, 2, 2, 2]  # each once, but for the one that may be read later
    evaluations.forget(3)
    assert evaluations[3] == metrics(5.0) and reads[-1] == 3


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, error, loss in [(1, 9.0, 1.0), (2, 5.0, 2.0), (3, 5.0, 1.0), (4, 5.0, 3.0), (5, 7.0, 1.0), (6, 8.0, 1.0)]:
        checkpoints.save(step, state(step), {}, metrics(error, loss))
    checkpoints.wait()
    assert checkpoints.steps() == [3, 5, 6]
    assert checkpoints.best_step() == 3  # the lower loss decides among equal errors
    assert checkpoints.metrics(5)["top1_error"] == 7.0
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2, read_only=True)
    assert again.best_step() == 3


def test_unevaluated_checkpoints_are_not_kept_for_ever(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, state(step), {}, metrics(5.0) if step == 1 else None)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4, 5]
    checkpoints.close()


def test_evaluations_on_another_split_or_size_are_not_compared(tmp_path):
    on = lambda split, size=8: {"split": split, "image_size": size}
    evaluations = {
        1: metrics(1.0) | on("test"),
        2: metrics(5.0) | on("val"),
        3: metrics(9.0),
        4: metrics(6.0) | on("val"),
    }
    assert sorted(comparable(evaluations)) == [2, 3, 4]  # those of older versions do not say
    assert sorted(comparable(evaluations | {5: metrics(7.0) | on("val", 16)})) == [3, 5]
    crop = lambda fraction: metrics(1.0) | on("val") | {"crop_fraction": fraction}
    crops = {1: crop(0.9), 2: crop(None), 3: crop(0.9)}
    assert sorted(comparable(crops)) == [1, 3]
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, evaluation in evaluations.items():
        checkpoints.save(step, state(step), {}, evaluation)
    checkpoints.wait()
    assert checkpoints.best_step() == 2 and checkpoints.steps() == [2, 4]
    checkpoints.close()


def test_a_step_whose_evaluation_cannot_be_read_once_is_not_deleted(tmp_path, monkeypatch):
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as first:
        for step, error in ((1, 5.0), (2, 9.0)):
            first.save(step, state(step), {}, metrics(error))
    said, read = [], Checkpoints._read_run

    def fail(self, step, path):
        if step == 1 and len(said) == 0:
            raise UserError("checkpoint 1 cannot be read now: Stale file handle")
        return read(self, step, path)

    monkeypatch.setattr(Checkpoints, "_read_run", fail)
    with contextlib.closing(Checkpoints(tmp_path, keep=1, warn=said.append)) as again:
        for step in (3, 4):
            again.save(step, state(step), {}, metrics(9.0))
        again.wait()
        assert again.steps() == [1, 4] and again.best_step() == 1
    assert said == ["warning: checkpoint 1 cannot be read now: Stale file handle; its evaluation is not known"]


def test_a_step_whose_evaluation_is_damaged_is_kept_no_longer_than_others(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as first:
        first.save(1, state(1), {}, metrics(5.0))
    (tmp_path / "checkpoints" / "1" / "seal.json").unlink()
    said = []
    with contextlib.closing(Checkpoints(tmp_path, keep=1, warn=said.append)) as again:
        for step in (2, 3):
            again.save(step, state(step), {}, metrics(9.0 - step))
        again.wait()
        assert again.steps() == [3] and len(said) == 1
