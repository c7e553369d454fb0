"""The training loop: restore or initialise, step, log, evaluate, save, print a summary."""

import contextlib
import dataclasses
import math
import pathlib
import shlex
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from etils import epath
from ml_collections import ConfigDict

from hga_flax.config.command_line import import_flags
from hga_flax.config.loading import validate
from hga_flax.data.sources import Source, dataset_info
from hga_flax.data.streams import PERMUTATION
from hga_flax.errors import Interrupted, called
from hga_flax.platforms import programs_for
from hga_flax.processes.coordination import barrier, check_same_arrays
from hga_flax.processes.distributed import union
from hga_flax.processes.mesh import replicate, to_devices
from hga_flax.processes.preemption import Agreement, Preemption, exit_code
from hga_flax.processes.settings import configure_process
from hga_flax.runs import workdir as files
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.clock import Clock, StartUp
from hga_flax.runs.console import Console, duration
from hga_flax.runs.profiler import Profiler
from hga_flax.runs.progress import Progress, check_same_size, complete
from hga_flax.runs.ranking import is_comparable, rank
from hga_flax.runs.run_folder import run_folder
from hga_flax.runs.writers import MetricWriter, finite_or_none
from hga_flax.storage.buckets import Remote, is_remote
from hga_flax.training.divergence import Diverged, StepReports, explain
from hga_flax.training.evaluation import evaluate, no_images
from hga_flax.training.experiment import Experiment, Plan, check_data_alike, create_experiment, describe, prepare
from hga_flax.training.initial_weights import Fitted, fit_weights, start_from
from hga_flax.training.metrics import TrainMetrics, all_finite, best_of, read, top5_text
from hga_flax.training.state import TrainState, create_state
from hga_flax.training.step import compile_step, make_eval_step, make_train_step
from hga_flax.training.weights_source import check_source


def train(config: ConfigDict, workdir_path: str, profile_steps: int = 0, began: float | None = None) -> int:
    """Trains as configured, starting from the workdir's newest checkpoint if there is one.

    SIGTERM and SIGINT end the run after the step in flight, which is saved (see preemption.py).

    Args:
        config: complete configuration.
        workdir_path: folder of the run.
        profile_steps: number of steps to trace after the first step has compiled; 0 disables tracing.
        began: start of the command by `time.monotonic()`, to report the time of its imports; default: this call.

    Returns:
        A signal that arrived when training was already over, so that the caller can still act on it; 0 if none did.

    Raises:
        UserError: the configuration, the data or the workdir cannot be used, or training diverged.
        Interrupted: a signal ended the run; the same call resumes it.
    """
    start_up = StartUp(time.monotonic() if began is None else began)
    if began is not None:
        start_up.mark("imports")
    validate(config)
    check_source(config, workdir_path)
    config = files.absolute_paths(config)
    if is_remote(workdir_path):
        Remote(workdir_path, "--workdir").files()  # check that it is readable before copying a data set
    with Preemption(config.training.grace_seconds) as preemption, contextlib.ExitStack() as opened:
        _train(config, workdir_path, preemption, start_up, profile_steps, opened)
    return preemption.signal


def _train(
    config: ConfigDict,
    workdir_path: str,
    preemption: Preemption,
    start_up: StartUp,
    profile_steps: int,
    opened: contextlib.ExitStack,
) -> None:
    configure_process(config)
    experiment = create_experiment(config, lambda: dataset_info(config.data.name, config.data.dir))
    opened.enter_context(programs_for(experiment.mesh.devices.flat[0]))
    console = Console(active=experiment.shard.process == 0, goes_on=True)
    bad_images = experiment.dataset.bad_images
    warn = lambda text: console.line(text, "yellow")
    if experiment.shard.process == 0:
        bad_images.log = warn
    plan, schedule, init, abstract = prepare(experiment)
    barrier("each has the data set")  # a process may first have to copy it from a bucket
    workdir, uploader = opened.enter_context(run_folder(workdir_path, experiment.shard.process))
    changes = files.check_same_run(workdir, config)
    info = experiment.dataset.described()
    check_data_alike(info)
    other_sizes = files.check_same_data(workdir, info)
    source = experiment.dataset.source(config.data.train_split)
    eval_source = experiment.dataset.source(config.data.eval_split, train=False)

    for text in other_sizes:
        warn(f"warning: {text}")
    uploader.begin(warn)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, warn=warn, changes=changes, uploader=uploader)
    try:
        console.table("hga_flax", describe(experiment, plan, abstract.params, new=not checkpoints.steps()))
        start_up.mark("data and network")
        restored = checkpoints.restore_latest(abstract)
        if restored is None:
            step, progress = 0, Progress(num_examples=len(source), shuffled=PERMUTATION)
            fitted = fit_weights(config, abstract) if config.init.weights else None  # may fail, so before anything slow
            if fitted is not None:
                check_same_arrays("what init.weights loads", dict(fitted.loaded))
        else:
            step, state, run = restored
            progress = Progress.restored(run)
            bad_images.remember(config.data.train_split, progress.bad_images)
            check_same_size(progress.num_examples, len(source))
            if step < plan.total_steps or progress.evaluation_due:
                changed = f"; changed: {', '.join(changes)}" if changes else ""
                console.line(f"resuming {shown(workdir)} at step {step}{changed}")
        compiled = None
        if step < plan.total_steps:
            console.line("tracing the training step ...")
            train_step = make_train_step(experiment.model, experiment.optimizer(schedule), config, experiment.mesh)
            compiled = compile_step(train_step, abstract, experiment.abstract_batch)
            start_up.mark("tracing")
        if restored is None:
            state = _new_state(experiment, init, fitted, workdir, console)
        check_same_arrays("the state to start from", {"params": state.params, "batch_stats": state.batch_stats})
        start_up.mark("state")
        # step + 1 compiles; the traces of several processes of a machine would have the same name
        first = step + 2 if profile_steps and experiment.shard.process == 0 else 0
        profiler = Profiler(workdir / "tensorboard", first, profile_steps, console.line)
        loop = Loop(experiment, plan, workdir, console, checkpoints, progress, preemption, profiler, start_up)
        if step >= plan.total_steps and not progress.evaluation_due:
            console.line(complete(shown(workdir), step, plan.total_steps))
        else:
            if experiment.shard.process == 0:
                files.write_config(workdir, config)
                files.write_dataset(workdir, info)
                if step == 0 or not (workdir / "parameters.txt").exists():  # it shows the values at the start
                    overview = parameter_overview.get_parameter_overview(state.variables("raw"))
                    files.write_text(workdir / "parameters.txt", overview + "\n")
                console.line(f"every parameter: {shown(workdir) / 'parameters.txt'}")
            loop.run(state, step, source, eval_source, compiled)
    finally:
        checkpoints.close()  # an interrupted run also finishes the checkpoint that it is writing
    opened.close()  # a run in a bucket is finished only when all of it is uploaded
    loop.summary()


def _new_state(
    experiment: Experiment, init: Any, fitted: Fitted | None, workdir: pathlib.Path, console: Console
) -> TrainState:
    """Returns the state before the first step of a new run, with `init.weights` loaded."""
    config = experiment.config
    console.line("compiling the initial state ...")
    state = create_state(init, config.seed, experiment.mesh)
    if fitted is None:
        return state
    state, _ = start_from(config, state, experiment.mesh, fitted)
    console.table("initial weights", fitted.rows())
    if experiment.shard.process == 0:
        files.write_text(workdir / "initial_weights.txt", fitted.text())
        console.line(f"every name: {shown(workdir) / 'initial_weights.txt'}")
    return state


def shown(path: pathlib.Path) -> pathlib.Path:
    """Returns the path as typed from the current folder; for a path in a local copy, the address in the bucket."""
    if is_remote(called(path)):
        return epath.Path(called(path))
    here = pathlib.Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


class Loop:
    """The training steps of one session, from a state to the end of training."""

    def __init__(
        self,
        experiment: Experiment,
        plan: Plan,
        workdir: pathlib.Path,
        console: Console,
        checkpoints: Checkpoints,
        progress: Progress,
        preemption: Preemption,
        profiler: Profiler,
        start_up: StartUp,
    ):
        self._experiment, self._plan, self._workdir = experiment, plan, workdir
        self._console, self._checkpoints, self._progress = console, checkpoints, progress
        self._preemption, self._profiler, self._start_up = preemption, profiler, start_up
        self._batch_size, self._stopped_by = experiment.config.training.batch_size, 0

    def run(self, state: TrainState, step: int, source: Source, eval_source: Source, compiled: Callable | None) -> None:
        """Trains from `step` to the end of the plan; `compiled` is what `compile_step` returned."""
        experiment, plan, config = self._experiment, self._plan, self._experiment.config
        first, self._eval_source, self._schedule = step + 1, eval_source, experiment.schedule(plan)
        self._eval_step = make_eval_step(experiment.model, config, experiment.mesh)
        self._agreement = Agreement(self._preemption, experiment.mesh, experiment.shard.processes)
        self._reports = StepReports(
            config.training.skip_nonfinite, int(state.skipped), lambda text: self._console.line(text, "yellow")
        )
        self._clock = Clock(plan.total_steps, self._batch_size, self._progress.elapsed_seconds)
        due, shard = self._progress.evaluation_due, experiment.shard
        self._writer = MetricWriter(self._workdir, step, active=shard.process == 0, again="eval" if due else None)
        seen, shuffled = self._progress.examples_seen, self._progress.shuffled
        host = experiment.dataset.train_batches(source, self._batch_size, shard, seen, shuffled)
        batches = to_devices(host, experiment.mesh)
        try:
            if step == 0:
                self._writer.config(config, [f"eval/{name}" for name in best_of(experiment.dataset.info.num_classes)])
            with self._console.start_progress(step, plan.total_steps):
                if due:
                    self._evaluate_and_save(step, state, evaluates=True)
                while step < plan.total_steps:
                    with self._clock.waiting():
                        batch = next(batches)
                    if step + 1 == first:
                        self._console.line("compiling the training step ...")
                        train_step, cached = compiled()
                        barrier("the training step is compiled")
                    with self._profiler.step(step + 1):
                        state, report = train_step(state, batch)
                    step += 1
                    self._profiler.after(step, report)
                    self._progress.examples_seen += self._batch_size
                    self._reports.add(step, report)
                    self._read_reports()
                    if step == first:
                        jax.block_until_ready(report)
                        self._preemption.begin()
                        self._clock.start(step)
                        self._start_up.mark(f"first step, {'compiled before' if cached else 'compilation included'},")
                        self._console.line(self._start_up.text())
                    if step % config.training.log_every_steps == 0 or step == plan.total_steps:
                        state = self._log(step, state)
                    self._after_step(step, state, self._agreement.stop())
        except Diverged as error:
            self._checkpoints.wait()
            raise explain(str(error), self._checkpoints.steps()) from None
        finally:
            host.close()  # ends worker processes
            self._profiler.close()
            self._writer.close()

    def _read_reports(self, **options: int) -> None:
        """Shows the newest loss read from the reports; see `StepReports.read`."""
        newest = self._reports.read(**options)
        if newest is not None:
            step, loss = newest
            self._console.update(step, f"loss {loss:.3f}  {self._pace(step, self._clock.speed(step))}")

    def _pace(self, step: int, speed: dict[str, float]) -> str:
        left = self._clock.eta(step)
        return _speed_text(speed) + ("" if left is None else f"ETA {duration(left)}")

    def _log(self, step: int, state: TrainState) -> TrainState:
        """Writes the metrics since the last line and returns the state with its metrics reset."""
        self._read_reports(in_flight=0)
        config, skipped = self._experiment.config, int(state.skipped)
        values, speed = read(state.metrics), self._clock.speed(step)
        norm, skips = {"gradient_norm": values.pop("gradient_norm")}, {"skipped_steps": skipped}
        more = (norm if config.optimizer.clip_norm else {}) | (skips if config.training.skip_nonfinite else {})
        rate = float(self._schedule(jnp.asarray(step - 1 - skipped)))  # skipped steps do not advance the schedule
        bad = {"bad_images": len(self._bad_images(config.data.train_split))}
        self._writer.scalars(step, "train", values | speed | {"learning_rate": rate} | bad | more)
        epoch = step / self._plan.steps_per_epoch
        # Not comparable to the evaluation's loss, which is always the cross-entropy, so the line names it.
        loss = "loss" if config.training.loss == "cross_entropy" else config.training.loss.replace("_", " ")
        self._console.line(
            f"step {step:>6}/{self._plan.total_steps}  epoch {epoch:6.2f}  {loss} {values['loss']:.4f}  "
            f"top-1 error {values['top1_error']:6.2f} %  lr {rate:.4g}  "
            + "".join(f"{name.replace('_', ' ')} {value:.4g}  " for name, value in more.items())
            + self._pace(step, speed)
        )
        self._clock.reset(step)
        zero = replicate(TrainMetrics.empty(), self._experiment.mesh)
        return dataclasses.replace(state, metrics=zero)

    def _after_step(self, step: int, state: TrainState, stop: int) -> None:
        """Evaluates and saves as planned at this step; saves if a signal asks to stop.

        Raises:
            Interrupted: a signal asks to stop; the step is saved.
        """
        every = self._experiment.config.checkpoint.every_steps
        evaluates = self._plan.evaluates_at(step)
        if stop or evaluates or (every and step % every == 0):
            self._evaluate_and_save(step, state, evaluates, stop)

    def _evaluate_and_save(self, step: int, state: TrainState, evaluates: bool, stop: int = 0) -> None:
        self._read_reports(in_flight=0)
        with self._clock.paused():
            # Checks more than the parameters: infinite momentum or statistics would break the next step.
            if not all_finite((state.params, state.batch_stats, state.opt_state)):
                raise Diverged(f"parameters, statistics or momentum are not finite after step {step}")
            metrics = self._evaluate(step, state) if evaluates and not stop else None
            due = evaluates and bool(stop or self._stopped_by)
            self._progress.evaluation_due = due
            self._progress.elapsed_seconds = self._clock.elapsed
            self._progress.bad_images = self._bad_images(self._experiment.config.data.train_split)
            with self._clock.saving():
                self._checkpoints.save(step, state, dataclasses.asdict(self._progress), metrics)
        if stop or due:
            self._checkpoints.wait()
            number = stop or self._stopped_by
            raise Interrupted(
                f"stopped by {signal.Signals(number).name} after step {step}, which is saved; the same command resumes",
                exit_code(number),
            )

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float | None] | None:
        """Returns the evaluation, or None if a signal ended it (see `_stopped_by`) or no image can be read."""

        def stop() -> int:
            self._stopped_by = self._agreement.stop()
            return self._stopped_by

        weights, experiment = state.variables(), self._experiment
        batches = experiment.dataset.eval_batches(self._eval_source, experiment.eval_batch_size, experiment.shard)
        metrics = evaluate(self._eval_step, weights["params"], weights["batch_stats"], batches, experiment.mesh, stop)
        if metrics is None:
            return None
        split, decay = experiment.config.data.eval_split, experiment.config.training.ema_decay
        bad = {"bad_images": len(self._bad_images(split))}
        if not metrics["num_examples"]:
            self._console.line(f"warning: step {step} is not evaluated: {no_images(split)}", "yellow")
            return None
        if not math.isfinite(metrics["loss"]):
            # Early running statistics may overflow in evaluation although training is fine.
            self._console.line(f"warning: the evaluation's loss after step {step} is {metrics['loss']}", "yellow")
        average = {"ema_decay": decay} if decay else {}  # marks that the evaluated weights are the moving average
        self._writer.scalars(step, "eval", metrics | bad | average)
        best, data = self._progress.best, experiment.config.data
        on = {"split": split, "image_size": experiment.eval_image_shape[0]}
        on["crop_fraction"] = data.eval_crop_fraction if data.augmentation == "imagenet" else None
        found = experiment.dataset.described([split])
        on |= {"split_size": found.num_examples[split], "split_digest": found.digests.get(split)}
        improved = best is None or not is_comparable(best, on) or rank(metrics) < rank(best)
        if improved:
            self._progress.best = {"step": step} | finite_or_none(metrics) | on
        self._console.line(
            f"step {step:>6}/{self._plan.total_steps}  evaluation{' (ema)' if decay else ''} on "
            f"{metrics['num_examples']:,}  "
            f"loss {metrics['loss']:.4f}  top-1 error {metrics['top1_error']:6.2f} %"
            + (f"  top-5 error {metrics['top5_error']:6.2f} %" if "top5_error" in metrics else "")
            + ("  (best so far)" if improved else ""),
            style="bold",
        )
        return finite_or_none(metrics) | on

    def _bad_images(self, split: str) -> list[int]:
        """Returns the indices of bad images found by any process; all processes must call this at the same steps."""
        own = self._experiment.dataset.bad_images
        found = union(own.found(split), limit=self._experiment.config.data.max_bad_images + 1)
        own.share(split, found)
        return found

    def summary(self) -> None:
        """Prints the run's results and where its files are."""
        workdir, progress = shown(self._workdir), self._progress
        best = progress.best
        steps = self._checkpoints.steps()
        last = self._checkpoints.metrics(steps[-1]) if steps else None
        rows = []
        if last is not None:
            top5 = top5_text(last, ", top-5")
            rows.append(("last", f"top-1 error {last['top1_error']:.2f} %{top5} (step {steps[-1]})"))
        if best is not None:
            rows.append(("best", f"top-1 error {best['top1_error']:.2f} % (step {int(best['step'])})"))
        rows += [
            ("time", duration(progress.elapsed_seconds)),
            ("checkpoints", f"{workdir / 'checkpoints'} (steps {', '.join(map(str, steps))})"),
            ("evaluate", f"python evaluate.py {shlex.join([f'--workdir={workdir}', *import_flags()])}"),
            ("curves", f"tensorboard {shlex.join([f'--logdir={workdir}'])}"),
        ]
        self._console.table("finished", rows)


def _speed_text(speed: dict[str, float]) -> str:
    if not speed:
        return ""
    return f"{speed['images_per_second']:,.0f} images/s  data wait {speed['data_wait_share']:.0%}  "
