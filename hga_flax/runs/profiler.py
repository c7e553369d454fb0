"""A trace of some steps, in the form that TensorBoard's profile page (the package `xprof`) opens."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax


class Profiler:
    """Traces consecutive steps of a session into `folder/plugins/profile`.

    Args:
        folder: where TensorBoard finds the curves of the run.
        first: the first step traced, by its number; 0 traces none.
        count: of the steps traced.
        log: takes a line that says where the trace is.
    """

    def __init__(self, folder: pathlib.Path, first: int, count: int, log: Callable[[str], None]):
        self._folder, self._log = folder, log
        self._steps = range(first, first + count) if first else range(0)
        self._tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Marks what happens inside as a step; begins the trace if it is the first."""
        if number not in self._steps:
            yield
            return
        if not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, result: Any) -> None:
        """Ends the trace after the last of its steps, whose `result` is awaited for that."""
        if self._tracing and number >= self._steps[-1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still going on, as where training ends before it."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            self._log(f"profile: {self._folder / 'plugins' / 'profile'}; to see it: pip install xprof, tensorboard")
