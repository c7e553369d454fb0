"""benchmarks/gpu: its rehearsal on a CPU, and what it does of itself."""

import json
import os
import re
import subprocess
import sys
import tarfile
import time

import pytest

from benchmarks.gpu import run as gpu
from benchmarks.gpu import wheels
from tests.commands import ROOT, environment
from tests.lab import made_up


def test_help():
    for module in ("run", "wheels"):
        shown = subprocess.run(
            [sys.executable, "-m", f"benchmarks.gpu.{module}", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert shown.returncode == 0 and "--out" in shown.stdout


def test_every_part_is_a_command_that_is_there(tmp_path):
    parts = gpu.parts(tmp_path, False, tmp_path / "data")
    names = ["step_resnet50", "step_resnext50_32x4d", "step_resnet50_free", "tests", "soak", "study",
             "step_resnet50_torch", "attention"]  # fmt: skip
    assert [part.name for part in parts] == names
    assert sum(part.most for part in parts[: names.index("study")]) < 10 * 60
    assert all((ROOT / test).exists() for test in gpu.TESTS) and (ROOT / gpu.STUDY).exists()
    without_images = [part.name for part in gpu.parts(tmp_path, False, None)]
    assert without_images == [name for name in names if name != "study"]


def test_only_some_parts(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.run", f"--out={tmp_path}", f"--scratch={tmp_path}", "--minutes=0"]
    chosen = subprocess.run([*command, "--only=soak"], cwd=ROOT, capture_output=True, text=True)
    assert chosen.returncode == 0 and chosen.stdout.startswith("== soak: left for the next call\n")
    unknown = subprocess.run([*command, "--only=soka"], cwd=ROOT, capture_output=True, text=True)
    assert unknown.returncode == 2 and "no part soka; there are step_resnet50" in unknown.stderr


@pytest.mark.medium
def test_a_part_is_cut_short_in_time_and_its_output_is_shown(tmp_path, capsys):
    begun = time.monotonic()
    slow = gpu.Part("slow", ["-c", "print('begun', flush=True)\nimport time\ntime.sleep(60)"], most=1)
    assert gpu.run_part(slow, tmp_path, 2) is None and time.monotonic() - begun < 30
    assert "begun" in capsys.readouterr().out
    assert gpu.run_part(gpu.Part("bad", ["-c", "raise SystemExit(3)"], most=1), tmp_path, 20) == 3


def test_a_part_does_not_outlive_its_command(tmp_path):
    child = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    program = (
        "import os, pathlib, signal, sys; from benchmarks.gpu import run as gpu; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
        f"gpu.ROOT = pathlib.Path({str(tmp_path)!r}); "
        f"gpu.run_part(gpu.Part('slow', ['-c', {child!r}], 60), gpu.ROOT, 60)"
    )
    command = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.1)
    command.terminate()
    assert command.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_measured_times_stand_beside_their_predictions(tmp_path):
    rows = [{"model": "resnet50", "attention": name, "step_ms": ms, "ratio_to_first": ms / 100}
            for name, ms in (("none", 100.0), ("hga", 105.0))]  # fmt: skip
    (tmp_path / "step_resnet50.txt").write_text("compiling ...\n" + json.dumps(rows, indent=2) + "\na warning\n")
    assert gpu.json_rows(tmp_path / "step_resnet50.txt") == rows
    told = [{"model": "resnet50", "attention": "hga", "roofline_s": 0.033, "bytes_accessed": 1e11}]
    (tmp_path / "predictions.json").write_text(json.dumps({"rows": told}))
    lines = gpu.summary(tmp_path, {"step_resnet50": {"status": "passed", "seconds": 9}}, tmp_path).splitlines()
    assert lines[0].split() == ["step_resnet50", "passed", "9", "s"]
    assert lines[-1].split() == ["resnet50", "hga", "105.00", "1.050", "33.00", "100.00"]
    assert lines[-2].split() == ["resnet50", "none", "100.00", "1.000", "-"]
    (tmp_path / "cut.txt").write_text("compiling ...\n[\n  {")
    assert gpu.json_rows(tmp_path / "cut.txt") == gpu.json_rows(tmp_path / "absent.txt") == []


def test_finished_runs_travel_and_unfinished_ones_do_not(tmp_path):
    study, archive = tmp_path / "study", tmp_path / "study.tar.gz"
    gpu.keep_study(study, archive)
    assert not archive.exists()
    made_up.write_result(study / "se" / "seed_0", 7.5)
    (study / "se" / "row.json").write_text("{}")
    (study / "hardware.json").write_text("{}")
    for begun in ("seed_0", "seed_1"):
        (study / "se" / begun / "checkpoints").mkdir(parents=True)
        (study / "se" / begun / "metrics.jsonl").write_text("")
    gpu.keep_study(study, archive)
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
    assert names == {"hardware.json", "se/row.json", "se/seed_0/result.json", "se/seed_0/metrics.jsonl"}


def test_the_wheels_are_those_of_the_projects_requirements():
    named = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert {package for package in wheels.NEEDED if "," in package} <= named
    name = lambda requirement: re.match(r"[\w-]+", requirement)[0]
    assert {name(line) for line in named if line} <= {*wheels.PRESENT, *wheels.UNUSED, *map(name, wheels.NEEDED)}
    fetch, build = wheels.commands("3.12", ROOT)
    assert {*fetch, *build} >= set(wheels.NEEDED) and set(wheels.SOURCE) <= set(build)
    assert "--only-binary=:all:" in fetch and "--python-version=3.12" in fetch


@pytest.mark.slow
def test_the_rehearsal_on_a_cpu(tmp_path):
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    rehearse = [sys.executable, "-m", "benchmarks.gpu.run", f"--out={out}", "--tiny", "--minutes=60"]
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
    first = subprocess.run([*rehearse, f"--scratch={scratch}"], **options)
    assert first.returncode == 0, first.stdout + first.stderr
    state = json.loads((out / "tiny" / "state.json").read_text())
    assert {name: about["status"] for name, about in state.items()} == dict.fromkeys(
        ("step_resnet50", "step_resnet50_free", "tests", "soak", "study", "attention"), "passed"
    )
    assert "runs of the study are finished" in first.stdout and "measured ms" in first.stdout
    made = len(list(scratch.glob("tiny/cifar10/*/seed_*/result.json")))
    assert made >= 1
    scratch = tmp_path / "another_machine"
    again = subprocess.run([*rehearse, f"--scratch={scratch}"], **options)
    assert again.returncode == 0 and again.stdout.count("finished before") == 5
    assert len(list(scratch.glob("tiny/cifar10/*/seed_*/result.json"))) > made
