import json
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboardX.event_file_writer import EventFileWriter
from tensorboardX.proto.event_pb2 import Event

from hga_flax.errors import UserError
from hga_flax.runs.writers import OURS, MetricWriter, finite_or_none
from tests.training import tiny


def events(workdir):
    reader = EventAccumulator(str(workdir / "tensorboard"))
    reader.Reload()
    return reader


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_what_is_not_finite_is_none():
    assert finite_or_none({"a": 1.0, "b": float("nan"), "c": float("inf")}) == {"a": 1.0, "b": None, "c": None}


def test_scalars_reach_tensorboard_and_the_json_lines(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.scalars(1, "train", {"loss": 2.5})
    writer.scalars(2, "eval", {"loss": float("nan")})
    writer.close()
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")] == [(1, 2.5)]
    assert lines(tmp_path) == [{"step": 1, "train/loss": 2.5}, {"step": 2, "eval/loss": None}]


def test_the_configuration_is_text_and_hyperparameters(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.config(tiny.config(), ["eval/top1_error"])
    writer.close()
    reader = events(tmp_path)
    text = reader.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"learning_rate": 0.05' in text
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(reader.summary_metadata)
    assert b"optimizer.learning_rate" in reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content


def test_going_on_drops_what_a_killed_run_wrote_later(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.scalars(step, "train", {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"step": 1, "tr')  # a damaged line, and one cut short by the kill
    writer = MetricWriter(tmp_path, 2)
    writer.scalars(3, "train", {"loss": 30.0})
    writer.close()
    assert [row["train/loss"] for row in lines(tmp_path)] == [1.0, 2.0, 30.0]
    assert [e.value for e in events(tmp_path).Scalars("train/loss")] == [1.0, 2.0, 30.0]


def test_a_run_that_starts_over_has_no_step_twice(tmp_path):
    for loss in (1.0, 2.0):
        writer = MetricWriter(tmp_path, 0)
        for step in (1, 2):
            writer.scalars(step, "train", {"loss": loss})
        writer.close()
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")] == [(1, 2.0), (2, 2.0)]


def test_a_run_that_resumes_with_a_clock_behind_is_read_last(tmp_path, monkeypatch):
    now = time.time()
    for step, behind in ((0, 0), (2, 7200), (4, 3600)):
        monkeypatch.setattr("time.time", lambda behind=behind: now - behind)
        writer = MetricWriter(tmp_path, step)
        for later in (1, 2, 3):  # the third by a session that was killed after its checkpoint
            writer.scalars(step + later, "train", {"loss": float(step)})
        writer.close()
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")] == [
        *[(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0)],
        *[(5, 4.0), (6, 4.0), (7, 4.0)],
    ]


def test_files_of_events_hold_no_abandoned_value(tmp_path):
    """Not every TensorBoard discards them: its data server looks only at the steps that are written again."""
    writer = MetricWriter(tmp_path, 0)
    writer.config(tiny.config(), ["eval/top1_error"])
    for step in (2, 4, 6, 8):
        writer.scalars(step, "train", {"loss": float(step)})
        writer.scalars(step, "eval", {"loss": float(step)})
    writer.close()
    (first,) = (tmp_path / "tensorboard").iterdir()
    with first.open("ab") as file:
        file.write(first.read_bytes()[-30:-5])  # a record that a kill cut short
    writer = MetricWriter(tmp_path, 4, again="eval")
    writer.scalars(4, "eval", {"loss": 40.0})
    writer.scalars(7, "train", {"loss": 70.0})  # every 7 steps now
    writer.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    found = [
        (event.step, value.tag)
        for file in sorted((tmp_path / "tensorboard").iterdir())
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag.endswith("/loss")
    ]
    assert found == [
        *[(2, "train/loss"), (2, "eval/loss"), (4, "train/loss")],
        *[(4, "eval/loss"), (7, "train/loss")],
    ]
    assert "config/text_summary" in events(tmp_path).Tags()["tensors"]


def test_files_of_others_beside_ours_are_left_alone(tmp_path):
    folder = tmp_path / "tensorboard"
    MetricWriter(tmp_path, 0).close()
    others = EventFileWriter(str(folder))  # a name without our step and process
    for step in (1, 900):
        others.add_event(Event(step=step))
    others.close()
    (folder / "events.out.tfevents.1.host.00000001.1").mkdir()
    (folder / "events.out.tfevents.2.host.00000001.2").symlink_to("nowhere")
    theirs = {file: file.read_bytes() for file in folder.iterdir() if file.is_file() and not OURS.fullmatch(file.name)}
    assert len(theirs) == 1
    MetricWriter(tmp_path, 5).close()
    assert {file: file.read_bytes() for file in theirs} == theirs


def test_a_folder_in_the_place_of_the_log_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        MetricWriter(tmp_path, 2)


def test_other_processes_write_nothing(tmp_path):
    writer = MetricWriter(tmp_path, 0, active=False)
    writer.config(tiny.config(), [])
    writer.scalars(1, "train", {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []
