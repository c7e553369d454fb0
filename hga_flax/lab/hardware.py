"""Ensures that all runs of a study have the same hardware, whichever worker carries them out.

XLA's order of summation depends on its number of threads, so the same run ends with different weights on one and on
two threads. On CPUs the size of XLA's thread pool matters, not the cores available to the process: XLA takes it from
the variable PJRT_NPROC or NPROC if set, else from the affinity mask (jax 0.10.2 and 0.12;
`tests/lab/test_hardware.py` compares the bits). On accelerators the number of devices matters, because the batch is
split over them.

The first worker writes DIR/hardware.json, which is binding for all later workers on any machine.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import re
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

from hga_flax.errors import UserError, one_line
from hga_flax.lab.runs import all_runs, read_json
from hga_flax.lab.study import Study

FILE = "hardware.json"
THREADS = 1  # default per run on CPUs: more workers use the cores better than more threads
POOL_VARIABLES = ("PJRT_NPROC", "NPROC")  # XLA reads the first that is set
CORES = re.compile(r"(\d+) CPU (?:core|thread)s?")  # device name in results; older versions wrote "cores"
GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Hardware of a run.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        devices: number of devices that share the batch.
        threads: size of XLA's thread pool; None if the platform is not a CPU.
    """

    platform: str
    devices: int
    threads: int | None

    def __str__(self) -> str:
        pool = "" if self.threads is None else f" with {count(self.threads, 'thread')}"
        return f"{count(self.devices, f'{self.platform.upper()} device')}{pool}"


def count(number: int, noun: str) -> str:
    """Returns a number with its noun in singular or plural, such as "1 thread" or "2 threads"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def gpus() -> list[str]:
    """Returns the NVIDIA GPUs visible to a process started here, named as in CUDA_VISIBLE_DEVICES."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu") or not any(map(importlib.util.find_spec, GPU_PLUGINS)):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # CUDA ignores the first name that is not valid, and all after it
        names = itertools.takewhile(lambda name: name.strip() not in ("", "-1"), visible.split(","))
        return [name.strip() for name in names]
    return [str(i) for i, _ in enumerate(sorted(pathlib.Path("/dev").glob("nvidia[0-9]*")))]


def settle(study: Study, say: Callable[[str], None]) -> Study:
    """Determines the hardware of each run: that of the folder's runs, else that set in the study, else the default.

    Args:
        study: `threads` and `devices` are 0 if the study does not set them.
        say: called with each line to show.

    Returns:
        The study with both set; `devices` stays 0 if all available devices will be used.

    Raises:
        UserError: the study requires different hardware from that of the folder's runs.
    """
    kept = read_json(study.directory / FILE) or {}
    threads = kept["threads"] if "threads" in kept else _earlier_threads(study, say)
    for name, here, there in (("threads", study.threads, threads), ("devices", study.devices, kept.get("devices"))):
        if here and there and here != there:
            raise UserError(
                f"{study.directory}: each run here has {count(there, name[:-1])}, and {name}={here} was requested; the "
                f"results depend on it: keep {name} at {there}, or choose another directory"
            )
    devices = study.devices or kept.get("devices") or (1 if gpus() else 0)
    return dataclasses.replace(study, threads=threads or study.threads or THREADS, devices=devices)


def _earlier_threads(study: Study, say: Callable[[str], None]) -> int | None:
    """Returns the number of threads recorded in the results of a folder without hardware.json."""
    runs = [run for run in all_runs(study) if run.workdir.exists()]
    results = [result for run in runs if (result := run.result())]
    found = Counter(int(m[1]) for r in results if (m := CORES.fullmatch(str(r.get("device", "")))))
    if len(found) > 1:
        numbers = ", ".join(f"{n} with {count(threads, 'thread')}" for threads, n in sorted(found.items()))
        say(f"warning: the runs in {study.directory} are not comparable: {numbers}; repeat them with --dir=NEW")
    begun = sum(not run.is_over for run in runs)
    threads = found.most_common(1)[0][0] if found else None
    if begun:
        say(
            f"warning: {count(begun, 'run')} in {study.directory} started with a number of threads that was not "
            f"recorded, and will continue with {threads or study.threads or THREADS}; delete unfinished runs to be sure"
        )
    return threads


def arrange(study: Study, part: tuple[int, int] = (0, 1)) -> None:
    """Restricts this process to the hardware of one run. Call before JAX initialises its devices.

    Args:
        study: a study from `settle`.
        part: (index of this worker, number of workers on this machine); they share its cores and GPUs.

    Raises:
        UserError: the machine has fewer devices than a run needs.
    """
    index, number = part
    _use_threads(study.threads)
    if visible := gpus():
        _take_gpus(visible, study.devices, index, number, study.file)
    else:
        use_cpu_devices(study)
    if number > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index::number] or [cores[index % len(cores)]])


def arrange_as_recorded(folder: pathlib.Path) -> None:
    """Restricts this process to the hardware of a folder's runs, as far as it has that kind; see `arrange`.

    Raises:
        UserError: the machine has fewer GPUs than a run needs, or JAX has been used already.
    """
    kept = read_json(folder / FILE) or {}
    visible = gpus()
    if kept.get("platform") == "gpu" and visible:
        _take_gpus(visible, kept.get("devices") or 1, 0, 1, str(folder))
    elif kept.get("platform") == "cpu" and not visible:
        if kept.get("threads"):
            _use_threads(kept["threads"])
        _set_cpu_devices(kept.get("devices") or 1)


def _use_threads(threads: int) -> None:
    for name in POOL_VARIABLES:
        os.environ[name] = str(threads)


def _set_cpu_devices(number: int) -> None:
    import jax

    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        raise UserError(
            "the number of CPU devices cannot be set, because a module has used JAX already; if it is one of --import, "
            "let it use JAX only inside functions"
        ) from None


def use_cpu_devices(study: Study) -> None:
    """Gives this process as many CPU devices as each run has, unless XLA_FLAGS sets their number."""
    _set_cpu_devices(study.devices or 1)


def _take_gpus(visible: list[str], devices: int, index: int, number: int, study: str) -> None:
    if devices > len(visible):
        raise UserError(f"{study}: each run has {count(devices, 'device')}, and this machine has {len(visible)}")
    own = [visible[(index * devices + i) % len(visible)] for i in range(devices)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    if number * devices > len(visible):  # workers share GPUs, so none may reserve all the memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def present() -> Hardware:
    """Returns the hardware of a run in this process."""
    import jax

    from hga_flax.data.pipeline import available_cores

    platform = jax.devices()[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    said = next((os.environ[name] for name in POOL_VARIABLES if os.environ.get(name, "").isdecimal()), None)
    threads = int(said or available_cores()) if platform == "cpu" else None
    return Hardware(platform, jax.device_count(), threads)


def facts(hardware: Hardware) -> dict[str, Any]:
    """Returns what a result records of the hardware of this process."""
    import jax

    cpu = hardware.threads is not None
    kind = count(hardware.threads, "CPU thread") if cpu else jax.devices()[0].device_kind
    return {"device": kind, "devices": hardware.devices, "threads": hardware.threads}


def made_on(recorded: dict[str, Any]) -> str:
    """Returns the hardware that a result records, such as "2 x NVIDIA H200" or "1 CPU thread"."""
    device, number = str(recorded["device"]), recorded.get("devices") or 1
    return device if number == 1 else f"{number} x {device}"


def hold(study: Study) -> Hardware:
    """Records the hardware of a study's runs in its folder, or checks that this process has the recorded hardware.

    Raises:
        UserError: this process has different hardware, or the file cannot be written.
    """
    here = present()
    wanted = dataclasses.replace(here, devices=study.devices or here.devices)
    if here != wanted:
        raise UserError(f"{study.file}: each run has {wanted}, and this process has {here}")
    kept = _keep(study.directory / FILE, dataclasses.asdict(here))
    there = Hardware(*(kept.get(field.name) for field in dataclasses.fields(Hardware)))
    if here != there:
        raise UserError(
            f"{study.directory}: each run here has {there}, and this process has {here}; on other hardware the "
            "results differ: choose another directory"
        )
    return here


def _keep(file: pathlib.Path, values: dict[str, Any]) -> dict[str, Any]:
    """Writes a JSON file unless it exists; safe against concurrent writers. Returns the file's content."""
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    text = json.dumps(values) + "\n"
    try:
        scratch.write_text(text)
        try:
            os.link(scratch, file)  # unlike a rename, never replaces a file
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            with contextlib.suppress(FileExistsError), file.open("x") as stream:
                stream.write(text)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or one_line(error)}") from None
    finally:
        scratch.unlink(missing_ok=True)
    return read_json(file) or values
