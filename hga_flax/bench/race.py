"""Fair timing: contenders take turns, A B C A B C ..., so that disturbances of the machine affect all of them."""

import dataclasses
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from types import ModuleType

from hga_flax.errors import UserError

TURN_SECONDS = 0.2  # a turn repeats short work for about this long, to amortise the wait for the device
MOST_REPEATS = 100


@dataclasses.dataclass(frozen=True)
class Timing:
    """Timing of one contender.

    Attributes:
        median, fastest: seconds per repetition.
        spread: (upper quartile - lower quartile) / median, over the rounds.
        ratio_to_first: median over the rounds of the time relative to the first contender's in the same round.
    """

    median: float
    fastest: float
    spread: float
    ratio_to_first: float


def race(
    contenders: Sequence[Callable[[int], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[Timing]:
    """Times contenders, which take turns.

    Each turn begins with one repetition that is not timed. Without it, a contender pays for the memory that the one
    before it left in another state: the same training step of ResNet-50 took 1.5 times as long after PyTorch's as after
    itself (benchmarks/NOTES.md, section 5).

    Args:
        contenders: functions that do their work the given number of times and return when it is
            finished. Each must have run at least once before.
        rounds: number of measurements of each contender.
        clock: returns the time in seconds.
    """

    def turn(work: Callable[[int], None], repeats: int) -> float:
        work(1)
        start = clock()
        work(repeats)
        return (clock() - start) / repeats

    repeats = [max(1, min(MOST_REPEATS, round(TURN_SECONDS / max(turn(work, 1), 1e-9)))) for work in contenders]
    times = [[] for _ in contenders]
    for _ in range(rounds):
        for own, work, count in zip(times, contenders, repeats, strict=True):
            own.append(turn(work, count))
    return [summarise(own, times[0]) for own in times]


def summarise(times: Sequence[float], first: Sequence[float]) -> Timing:
    """Returns the `Timing` of a contender, from its seconds and the first contender's in each round."""
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (median,) * 3
    ratios = [own / other for own, other in zip(times, first, strict=True)]
    return Timing(median, min(times), (high - low) / median, statistics.median(ratios))


def benchmarks_of_others(name: str, flag: str) -> ModuleType:
    """Returns a module of benchmarks/, which is in the repository but not in the installed package.

    Raises:
        UserError: the command was not started in a clone, or the module cannot be used, for example without PyTorch.
    """
    try:
        return importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", f"benchmarks.{name}"):
            raise
        raise UserError(f"{flag}: benchmarks/{name}.py is not here; start the command in a clone") from None
