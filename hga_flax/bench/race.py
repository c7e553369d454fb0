"""Fair timing: contenders take turns, A B C A B C ..., so that what slows the machine down slows all of them."""

import dataclasses
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from types import ModuleType

from hga_flax.errors import UserError

TURN_SECONDS = 0.2  # a turn repeats short work for about this long, so that waiting for the device weighs little
MOST_REPEATS = 100


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes:
        median, fastest: seconds of one repetition.
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
    """Times contenders in turns.

    Args:
        contenders: each repeats its work as many times as asked, and returns when it is done. Each
            has run at least once before.
        rounds: turns of each.
        clock: tells the time in seconds.
    """

    def turn(work: Callable[[int], None], repeats: int) -> float:
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
    """Returns the `Timing` of a contender's seconds round by round, beside the first's."""
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (median,) * 3
    ratios = [own / other for own, other in zip(times, first, strict=True)]
    return Timing(median, min(times), (high - low) / median, statistics.median(ratios))


def benchmarks_of_others(name: str, flag: str) -> ModuleType:
    """Returns a module of benchmarks/, which lies in the clone beside the package and is not installed with it.

    Raises:
        UserError: the command was not started in the clone, or the module's own reason, such as no PyTorch.
    """
    try:
        return importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", f"benchmarks.{name}"):
            raise
        raise UserError(f"{flag}: benchmarks/{name}.py is not here; start the command in the clone") from None
