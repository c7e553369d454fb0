"""Traces a few steps for TensorBoard's profile page (package `xprof`)."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from hga_flax.errors import one_line


class Profiler:
    """Traces consecutive steps of a session into `folder/plugins/profile`.

    Args:
        folder: TensorBoard folder of the run.
        first: number of the first step to trace; 0 disables tracing.
        count: number of steps to trace.
        log: called with a line that says where the trace is.
    """

    def __init__(self, folder: pathlib.Path, first: int, count: int, log: Callable[[str], None]):
        self._folder, self._log = folder, log
        self._steps = range(first, first + count) if first else range(0)
        self._tracing = self._done = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Marks this context as one step; starts the trace at the first step to trace."""
        if number not in self._steps:
            yield
            return
        if not self._tracing and not self._done:
            with self._reported():
                jax.profiler.start_trace(str(self._folder))
                self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, result: Any) -> None:
        """Ends the trace after its last step, once the step's `result` is ready."""
        if self._tracing and number >= self._steps[-1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Stops a running trace, such as when training ends before the last traced step; says if none was made."""
        if self._tracing:
            self._tracing = False
            with self._reported():
                jax.profiler.stop_trace()
                self._log(
                    f"profile: {self._folder / 'plugins' / 'profile'}; view it in TensorBoard (pip install xprof)"
                )
        elif self._steps and not self._done:
            self._log(f"profile: no step was traced, since training ended before step {self._steps[0]}")
        self._done = True

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Logs an error as a warning: training goes on without a trace."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            self._done = True
            self._log(f"warning: the profile cannot be written: {one_line(error)[:300]}")
