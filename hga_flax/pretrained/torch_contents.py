"""What a file of weights holds, and which of its tensors are a given network's.

Training programs wrap weights in many ways: a state dict may stand alone, under a key, under keys within keys,
beside an average of itself, an optimizer and options, and each name may begin with `module.`, `backbone.` and
others. All of it is one list of full names here, and what stands before a network's own names is found by what
fits: the prefix under which the most of them are there, in their shapes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from hga_flax.pretrained.torch_pickle import StandIn, Tensor

# Segments that wrappers of modules put into names, at any place: DataParallel, torch.compile, FSDP.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|averaged?|shadow)([._]|$)")
_COUNTERS = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")
_DEEP = 32  # nested containers that are looked into
SHOWN = 4  # names in messages


class Leaf(NamedTuple):
    """A tensor in a file.

    Attributes:
        container: the keys that lead to its dictionary, each with a dot behind it.
        name: its key there.
    """

    container: str
    name: str
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class Choice:
    """The tensors of a file that were taken for a network's.

    Attributes:
        label: the prefix under which they stand, "" at the top.
        tensors: by their names without it, not yet read.
        score: how many of the network's tensors are among them in their shapes, and how many by name.
        others: the labels under which as many fitted.
    """

    label: str
    tensors: Mapping[str, Tensor]
    score: tuple[int, int] = (0, 0)
    others: tuple[str, ...] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """Reads the tensors.

        Raises:
            ValueError: one of them does not fit the file.
        """
        return {name: tensor.array() for name, tensor in self.tensors.items()}

    def note(self) -> str:
        """Returns what was taken where there was a choice, "" where there was none."""
        if not self.others:
            return ""
        average = " (an average of the weights)" if _AVERAGE.search(self.label) else ""
        others = ", ".join(label or "." for label in self.others)
        what = self.label or "the tensors at the top"
        return f"{what}{average}; as many fit under {others}: FILE@{self.others[0] or '.'} takes those"


class Contents:
    """The tensors of a file.

    Args:
        loaded: what it holds: dictionaries, lists and stand-ins of any depth.
    """

    def __init__(self, loaded: Any):
        self.leaves: list[Leaf] = []
        self._top: dict[str, str] = {}  # the keys at the top and what is under them
        self._modules: list[StandIn] = []
        self._seen: set[int] = set()
        self._collect(loaded, "", 0)
        for key, value in _entries(loaded):
            self._top[key] = self._kind(key, value)

    def _collect(self, value: Any, container: str, depth: int) -> None:
        if isinstance(value, StandIn) and value.is_module:
            self._modules.append(value)
        if id(value) in self._seen or depth > _DEEP:
            return
        self._seen.add(id(value))
        for key, entry in _entries(value):
            if isinstance(entry, Tensor):
                self.leaves.append(Leaf(container, key, entry))
            else:
                self._collect(entry, f"{container}{key}.", depth + 1)

    def _kind(self, key: str, value: Any) -> str:
        if isinstance(value, Tensor):
            return "tensor"
        count = sum(leaf.container.startswith(f"{key}.") for leaf in self.leaves)
        if count:
            return _tensors(count)
        return value.origin if isinstance(value, StandIn) else ""

    def check(self) -> None:
        """Raises a ValueError, which says what the file holds, unless it has tensors."""
        if self.leaves:
            return
        if self._modules:
            raise ValueError(
                f"it holds a whole pickled network ({self._modules[0].origin}), not its weights; where its code is at "
                "hand, save the weights alone: torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW), "
                "or of the entry of FILE that is the network"
            )
        raise ValueError(f"it holds no tensors; it has {self.describe()}")

    def describe(self) -> str:
        """Returns the keys at the top, with what is under them, and the first names of the most tensors."""
        tensors = [key for key, kind in self._top.items() if kind == "tensor"]
        parts = [f"{key} ({kind})" if kind else key for key, kind in self._top.items() if kind != "tensor"]
        if tensors:
            parts.insert(0, f"{_tensors(len(tensors))} ({_listed(tensors)})")
        text = _listed(parts, 12) if parts else "nothing by name"
        if not tensors and self.leaves:
            container = self._largest()
            names = [leaf.name for leaf in self.leaves if leaf.container == container]
            text += f"; in {container.removesuffix('.')}: {_listed(names)}"
        return text

    def _largest(self) -> str:
        counts: dict[str, int] = {}
        for leaf in self.leaves:
            counts[leaf.container] = counts.get(leaf.container, 0) + 1
        most = max(counts.values())
        equal = [container for container, count in counts.items() if count >= most - 1]  # one is n_averaged
        return next((container for container in equal if _AVERAGE.search(container)), equal[0])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns the dictionary with the most tensors, an average before what it is of, without `module.`."""
        container = self._largest()
        tensors = {leaf.name: leaf.tensor for leaf in self.leaves if leaf.container == container}
        names = {name: _WRAPPERS.sub("", name) for name in tensors if name != "n_averaged"}
        if len(set(names.values())) < len(names):
            names = {name: name for name in tensors}
        return {new: tensors[name].array() for name, new in names.items()}

    def choose(self, shapes: Mapping[str, tuple[int, ...]], rename: Any = str, wanted: str = "") -> Choice:
        """Returns the tensors that fit a network best.

        Args:
            shapes: of its tensors, by the names that its state dict has.
            rename: brings names of older files to today's.
            wanted: the label that the user asked for, "." for the top, "" for none.

        Raises:
            ValueError: nothing stands under `wanted`; the message lists what fits.
        """
        names = self._full_names(rename)
        found: dict[str, dict[str, Leaf]] = {}
        for name, leaf in zip(names, self.leaves, strict=True):
            for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
                if name[start:] in shapes:
                    found.setdefault(name[:start], {}).setdefault(name[start:], leaf)
        scores = {
            prefix: (sum(_fits(leaf.tensor.shape, shapes[name]) for name, leaf in hits.items()), len(hits))
            for prefix, hits in found.items()
        }
        if wanted:
            whole = wanted.strip(".") + "."
            scores = _under(scores, whole) or _under(scores, _WRAPPERS.sub("", whole))
            if not scores:
                raise ValueError(f"nothing under '{wanted}' fits; it has {self.describe()}")
        if not scores:
            return Choice("", {})
        best = max(scores.values())
        equal = [prefix for prefix in found if scores.get(prefix) == best]
        prefix = next((prefix for prefix in equal if _AVERAGE.search(prefix)), equal[0])
        others = tuple(other.removesuffix(".") for other in equal if other != prefix)
        containers = {leaf.container for leaf in found[prefix].values()}
        taken = {
            name.removeprefix(prefix): leaf.tensor
            for name, leaf in zip(names, self.leaves, strict=True)
            if name.startswith(prefix) and leaf.container in containers and not _COUNTERS.search(name)
        }
        return Choice(prefix.removesuffix("."), taken, best, others)

    def _full_names(self, rename: Any) -> list[str]:
        names = [leaf.container + leaf.name for leaf in self.leaves]
        plain = [_WRAPPERS.sub("", name) for name in names]
        return [rename(name) for name in (plain if len(set(plain)) == len(set(names)) else names)]


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'s' if count != 1 else ''}"


def _under(scores: dict[str, tuple[int, int]], wanted: str) -> dict[str, tuple[int, int]]:
    """Returns the prefixes that begin with the wanted one; "." is the top."""
    if wanted in (".", ""):
        return {prefix: score for prefix, score in scores.items() if not prefix}
    return {prefix: score for prefix, score in scores.items() if prefix.startswith(wanted)}


def _fits(given: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether shapes agree, with convolutions of a whole map taken for fully connected layers."""
    whole = len(expected) == 2 and len(given) == 4 and (given[0], math.prod(given[1:])) == expected
    return given == expected or whole


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what a container holds, by key; nothing for what is no container."""
    if isinstance(value, StandIn):
        value = value.items
    if isinstance(value, dict):  # by the class's own method: a pickle may have set another on the object
        yield from ((str(key), entry) for key, entry in dict.items(value))
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), entry) for i, entry in enumerate(value))


def _listed(names: list[str], shown: int = SHOWN) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")
