"""Runs all GPU checks in one command of at most 8 minutes, which prints as it goes and can be repeated.

    python -m benchmarks.gpu.run --out=DIR [--images=FOLDER] [--minutes=8] [--only=PART,...]

The parts, most valuable first: whole training steps of two networks with three attentions in bfloat16; the first
network's with nondeterministic operations allowed; the fast tests that use the device; a run that is killed and
resumed, compared bit for bit with one that is not; as many runs of the CIFAR-10 study's large size as time allows;
training steps compared with PyTorch's (timm under torch.compile, which compiles for minutes); and the attentions alone.
--only=soak,tests runs only these parts.

Finished parts are not repeated. A part that was cut short starts again in the next call; the study resumes, also from
the finished runs in results/runs. DIR/summary.txt has the results so far. DIR stays small because it may have to be
copied: images and workdirs are in --scratch, and DIR/study.tar.gz holds the small files of the study's finished runs,
from which a call on another machine continues.

FOLDER holds CIFAR-10 as JPEG: {train,test}/CLASS/*.jpg, or train.tar.xz and test.tar.xz of them; without it the
study is skipped. The figures of `python -m hga_flax compile` for the same steps are printed next to the measured
times if they have been computed before, on any machine, into the same DIR:

    python -m benchmarks.gpu.run --out=DIR --predict=h100

For packages that a machine without internet lacks, use python -m benchmarks.gpu.wheels. --tiny is a rehearsal that
takes minutes on a CPU.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
KEPT_RUNS = ROOT / "results" / "runs" / "cifar10_attention_large"
MODELS = ("resnet50", "resnext50_32x4d")
ATTENTIONS = ("none", "se", "hga")
BATCH = 256
# Values and gradients of device code; other tests need eight devices, which only CPUs simulate.
TESTS = (
    "tests/attention",
    "tests/models/test_norm.py",
    "tests/models/test_convolution.py",
    "tests/images/test_device_augmentation.py",
    "tests/training/test_metrics.py",
    "tests/training/test_optimizer.py",
)
TINY_STUDY = (
    "data.name=cifar10", "data.fake=true", "data.fake_examples=64", "data.image_size=16", "model.name=cifar_resnet8",
    "model.options=features=4", "training.batch_size=32", "training.epochs=2", "evaluation.batch_size=32",
)  # fmt: skip
KEPT = ("result.json", "failure.json", "metrics.jsonl", "command.txt", "config.json", "dataset.json")  # per run
FREE = "_free"  # the same steps with nondeterministic operations allowed
TORCH = "_torch"  # steps that take turns with PyTorch's
STUDY = "studies/cifar10_attention.py"
NOT_DETERMINISTIC = "--xla_gpu_deterministic_ops=false"  # overrides training.deterministic
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several processes on one GPU
OVER = ("passed", "failed", "too long")
END_SECONDS = 25  # between a part's SIGTERM and SIGKILL, for the study to save its runs


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the checks: one command.

    Attributes:
        name: name of the part and of its output, OUT/NAME.txt.
        command: arguments of `python`.
        most: time limit in seconds.
        least: seconds that must be left to start the part.
        environment: variables added to this process's environment.
    """

    name: str
    command: list[str]
    most: float
    least: float = 20.0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def parts(study_folder: pathlib.Path, tiny: bool, data: pathlib.Path | None) -> list[Part]:
    """Returns the parts, most valuable first.

    Args:
        study_folder: folder for the study's runs.
        tiny: return the parts of the rehearsal.
        data: folder of the prepared images, or None.
    """
    size = ["--batch=2", "--image-size=32", "--steps=1"] if tiny else [f"--batch={BATCH}", "--steps=10"]
    step = ["-m", "hga_flax", "bench", "step", "--dtype=bfloat16", "--json", *size]
    found = []
    for model in MODELS[:1] if tiny else MODELS:
        network = "cifar_resnet8" if tiny else model
        models = ",".join(f"{network}:{attention}" for attention in ATTENTIONS[: 2 if tiny else None])
        found.append(Part(f"step_{model}", [*step, f"--models={models}"], most=100))
    models = found[0].command[-1]
    found.append(Part(f"step_{MODELS[0]}{FREE}", [*step, models], 110, environment={"XLA_FLAGS": NOT_DETERMINISTIC}))
    tests = ("tests/attention/test_se.py",) if tiny else TESTS
    # Full float32 products: the tests compare with float64, but by default a GPU rounds to 10 bits.
    exact = {"HGA_TEST_PLATFORM": "" if tiny else "cuda", "JAX_DEFAULT_MATMUL_PRECISION": "highest"} | SHARED
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20", "--dist=loadfile"]
    found.append(Part("tests", [*pytest, "-n", "1" if tiny else "4", *tests], most=130, environment=exact))
    soak = ["-m", "hga_flax", "soak", "--config=configs/digits.py", "--json", f"--kills={1 if tiny else 2}"]
    soak += [f"--config.training.steps={20 if tiny else 60}", "--config.checkpoint.every_steps=10"]
    found.append(Part("soak", soak, most=140))
    study = ["-m", "hga_flax", "study", STUDY, f"--dir={study_folder}"]
    if tiny:
        study += [*(f"--config.{key}" for key in TINY_STUDY), "--minutes=0.3"]
    elif data:
        study += [f"--config.data.dir={data}", "--scale=large", "--workers=8"]
    if tiny or data:
        found.append(Part("study", study, most=3600, least=60))
    if not tiny:
        versus = [*step, f"--models={MODELS[0]}:none,{MODELS[0]}:hga", "--vs-torch"]
        found.append(Part(f"step_{MODELS[0]}{TORCH}", versus, most=420, least=120))
    alone = ["-m", "hga_flax", "bench", "attention", "--dtype=bfloat16"]
    alone += ["--attentions=none,se", "--batch=1", "--rounds=1"] if tiny else [f"--batch={BATCH}"]
    found.append(Part("attention", alone, most=120))
    # A generous limit, so that a rehearsal finishes even on a slow machine.
    return [dataclasses.replace(part, most=1800) for part in found] if tiny else found


def keep_study(folder: pathlib.Path, archive: pathlib.Path) -> None:
    """Archives the small files of the study's finished runs."""
    over = {file.parent for file in [*folder.glob("*/seed_*/result.json"), *folder.glob("*/seed_*/failure.json")]}
    files = [run / name for run in sorted(over) for name in KEPT if (run / name).exists()]
    files += sorted([*folder.glob("*.json"), *folder.glob("*/row.json")])
    if not over:
        return
    with tarfile.open(archive, "w:gz") as tar:
        for file in files:
            tar.add(file, file.relative_to(folder))


def prepare_images(images: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Prepares the images of the study in `out` unless this is done; returns the folder of the data sets."""
    data = out / "data"
    if not (data / "cifar10_jpeg").is_dir():
        archives = sorted(images.glob("*.tar.xz"))
        for archive in archives:
            with tarfile.open(archive) as tar:
                tar.extractall(out / "images", filter="data")
        folder = out / "images" if archives else images
        command = ["-m", "hga_flax", "prepare", "folder", str(folder), "--name=cifar10_jpeg", f"--data-dir={data}"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return data


def run_part(part: Part, out: pathlib.Path, seconds: float) -> int | None:
    """Runs a part, prints its output and writes it to OUT/NAME.txt; returns the exit status, or None if cut short."""
    with (out / f"{part.name}.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | part.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        shown, deadline = 0, time.monotonic() + seconds
        cut = None
        try:
            while process.poll() is None:
                time.sleep(0.2)
                shown = _show(out / f"{part.name}.txt", shown)
                now = time.monotonic()
                if cut is None and now > deadline:
                    cut = now
                    process.send_signal(signal.SIGTERM)
                if cut is not None and now > cut + END_SECONDS:
                    os.killpg(process.pid, signal.SIGKILL)
        except BaseException:  # Ctrl-C or SIGTERM to this command: also end the part
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        _show(out / f"{part.name}.txt", shown)
    return None if cut else process.returncode


def _show(file: pathlib.Path, start: int) -> int:
    text = file.read_text(errors="replace")
    sys.stdout.write(text[start:])
    sys.stdout.flush()
    return len(text)


def read_json(file: pathlib.Path) -> dict:
    """Returns the dictionary in a JSON file, or {} if the file does not exist."""
    return json.loads(file.read_text()) if file.exists() else {}


def json_rows(file: pathlib.Path) -> list[dict]:
    """Returns the JSON list at the end of a command's output, or [] if it is missing or incomplete."""
    text = file.read_text() if file.exists() else ""
    begin = text.find("\n[\n") + 1 if "\n[\n" in text else 0 if text.startswith("[\n") else -1
    try:
        return json.JSONDecoder().raw_decode(text[begin:])[0] if begin >= 0 else []
    except ValueError:
        return []


def summary(out: pathlib.Path, done: dict[str, dict], study: pathlib.Path) -> str:
    """Returns the results so far: the parts, the measured and predicted step times, and the number of study runs."""
    lines = [f"{name:24} {about['status']:10} {about['seconds']:7.0f} s" for name, about in done.items()]
    predicted = {(row["model"], row["attention"]): row for row in read_json(out / "predictions.json").get("rows", [])}
    for part in [f"step_{model}{free}" for model in MODELS for free in ("", FREE, TORCH)]:
        rows = json_rows(out / f"{part}.txt")
        if not rows:
            continue
        lines += [
            "",
            *(["not deterministic:"] if part.endswith(FREE) else []),
            f"{'network':28} {'attention':10} {'measured ms':>12} {'to first':>9} {'at least ms':>12} {'GB':>8}",
        ]
        for row in rows:
            told = predicted.get((row["model"], row["attention"]))
            limit = f"{told['roofline_s'] * 1e3:>12.2f} {told['bytes_accessed'] / 1e9:>8.2f}" if told else f"{'-':>12}"
            lines.append(
                f"{row['model']:28} {row['attention']:10} {row['step_ms']:>12.2f} {row['ratio_to_first']:>9.3f} {limit}"
            )
    results = sorted(study.glob("*/seed_*/result.json"))
    if results:
        lines += ["", f"{len(results)} runs of the study are finished: {out / 'study.tar.gz'}"]
    return "\n".join(lines) + "\n"


def predict(out: pathlib.Path, topology: str, tiny: bool) -> int:
    """Compiles the steps for an absent GPU and saves their predicted costs in OUT/predictions.json."""
    rows = []
    for model in MODELS[:1] if tiny else MODELS:
        command = ["-m", "hga_flax", "compile", "--config=configs/hga_resnet50.py", f"--config.model.name={model}"]
        command += ["--config.model.dtype=bfloat16", f"--topology={topology}", f"--batch={BATCH}"]
        command += [f"--compare={','.join(ATTENTIONS)}", "--json"]
        made = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if made.returncode:
            return made.returncode
        rows += json.loads(made.stdout)
    (out / "predictions.json").write_text(json.dumps({"topology": topology, "rows": rows}, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder for the output and the runs, from which a later call resumes",
    )
    parser.add_argument("--images", metavar="FOLDER", help="CIFAR-10 as JPEGs: a folder, or a folder of archives")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M", help="time budget of this call (default: 8)")
    parser.add_argument("--scratch", metavar="DIR", help="folder for images and workdirs (default: a temporary one)")
    parser.add_argument("--only", metavar="PART,...", help="run only these parts: tests, step_resnet50, soak, ...")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU, in DIR/tiny")
    parser.add_argument("--predict", metavar="TOPOLOGY", help="only compile the steps for h100, h200, ..., then exit")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    apart = "tiny" if arguments.tiny else ""  # what is rehearsed counts for nothing
    began, out = time.monotonic(), pathlib.Path(arguments.out).absolute() / apart
    out.mkdir(parents=True, exist_ok=True)
    if arguments.predict:
        return predict(out, arguments.predict, arguments.tiny)
    left = lambda: 60 * arguments.minutes - END_SECONDS - (time.monotonic() - began)
    scratch = pathlib.Path(arguments.scratch or pathlib.Path(tempfile.gettempdir()) / "hga_flax_gpu").absolute() / apart
    study, archive = scratch / "cifar10", out / "study.tar.gz"
    study.mkdir(parents=True, exist_ok=True)
    if not list(study.iterdir()):
        if KEPT_RUNS.is_dir() and not arguments.tiny:
            shutil.copytree(KEPT_RUNS, study, dirs_exist_ok=True)
        if archive.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(study, filter="data")
    data = prepare_images(pathlib.Path(arguments.images).absolute(), scratch) if arguments.images else None
    state = out / "state.json"
    done = read_json(state)
    wanted = parts(study, arguments.tiny, data)
    if arguments.only:
        names = arguments.only.split(",")
        if unknown := set(names) - {part.name for part in wanted}:
            parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in wanted)}")
        wanted = [part for part in wanted if part.name in names]
    for part in wanted:
        # The study skips its finished runs itself.
        if part.name != "study" and done.get(part.name, {}).get("status") in OVER:
            before = done[part.name]["status"]
            again = "" if before == "passed" else f" ({before}); to repeat it, take it out of {state}"
            print(f"== {part.name}: finished before{again}", flush=True)
            continue
        if left() < (0 if arguments.tiny else part.least):
            print(f"== {part.name}: left for the next call", flush=True)
            continue
        print(f"== {part.name}: python {' '.join(part.command)}", flush=True)
        start = time.monotonic()
        seconds = min(part.most, left())
        status = run_part(part, out, seconds)
        told = {None: "too long" if seconds == part.most else "cut short", 0: "passed"}.get(status, "failed")
        done[part.name] = {"status": told, "seconds": round(time.monotonic() - start, 1)}
        state.write_text(json.dumps(done, indent=1) + "\n")
        keep_study(study, archive)
        (out / "summary.txt").write_text(summary(out, done, study))
    print(summary(out, done, study), end="", flush=True)
    return int(any(about["status"] == "failed" for about in done.values()))


if __name__ == "__main__":
    sys.exit(main())
