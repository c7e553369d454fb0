"""The contents of a weights file, and the search for the tensors in it that belong to a given network.

Training programs wrap weights in many ways: a state dict may be at the top level, under a key or under nested keys,
next to an average of the weights, an optimizer and options, and names may start with `module.`, `backbone.` and so on.
Here all tensors form one list with full names. The chosen prefix is the one under which most of the network's tensors
are found with the right shapes.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from hga_flax.pretrained.file_kinds import listed
from hga_flax.pretrained.torch_pickle import StandIn, Tensor

# Segments that module wrappers insert anywhere in names: DataParallel, torch.compile, FSDP.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_AVERAGE = re.compile(r"(^|\.|(?<!exp)_)(ema|swa|avg|averaged?|shadow)([._]|$)")  # not Adam's exp_avg
_OPTIMIZER = re.compile(r"(^|\.)optim(izers?)?(_states?)?(_dict)?\.")
_COUNTERS = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")
_DEEP = 32  # maximum nesting depth of containers


class Leaf(NamedTuple):
    """A tensor in a file.

    Attributes:
        container: path of the dictionary that holds it: its keys, each followed by a dot.
        name: its key in that dictionary.
        tensor: the tensor.
    """

    container: str
    name: str
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class Choice:
    """The tensors of a file that were chosen for a network.

    Attributes:
        label: common prefix of their names, "" at the top level.
        tensors: the tensors by their names without the prefix; their values have not been read yet.
        score: (number of the network's tensors that match in name and shape, number that match in name).
        others: labels with an equal score.
    """

    label: str
    tensors: Mapping[str, Tensor]
    score: tuple[int, int] = (0, 0)
    others: tuple[str, ...] = ()

    @property
    def is_average(self) -> bool:
        """Whether the name of the tensors says that they are an average of the weights."""
        return bool(_AVERAGE.search(self.label))

    def arrays(self) -> dict[str, np.ndarray]:
        """Reads the tensors.

        Raises:
            ValueError: a tensor is inconsistent with the file.
        """
        return {name: tensor.array() for name, tensor in self.tensors.items()}

    def note(self) -> str:
        """Returns a note on what was chosen if there were alternatives, otherwise ""."""
        if not self.others:
            return ""
        average = " (an average of the weights)" if self.is_average else ""
        others = ", ".join(label or "." for label in self.others)
        what = self.label or "the tensors at the top level"
        return f"{what}{average}; as many fit under {others}: FILE@{self.others[0] or '.'} selects those"


class Contents:
    """The tensors of a file.

    Args:
        loaded: the unpickled object: nested dictionaries, lists and stand-ins.
    """

    def __init__(self, loaded: Any):
        self.leaves: list[Leaf] = []
        self._top: dict[str, str] = {}  # top-level keys and a description of their values
        self._modules: list[StandIn] = []
        self._seen: set[int] = set()
        self._tensor = loaded if isinstance(loaded, Tensor) else None
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
        """Raises a ValueError that describes the contents if the file has no tensors."""
        if self.leaves:
            return
        if self._modules:
            raise ValueError(
                f"it holds a whole pickled network ({self._modules[0].origin}), not its weights; where its code is "
                "available, save only the weights: torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW), "
                "or those of the entry of FILE that is the network"
            )
        if self._tensor is not None:
            raise ValueError("it holds one tensor without a name; give a state dict, which names its tensors")
        raise ValueError(f"it holds no tensors; it has {self.describe()}")

    def describe(self) -> str:
        """Describes the contents: the top-level keys, and the first names in the dictionary with the most tensors."""
        tensors = [key for key, kind in self._top.items() if kind == "tensor"]
        parts = [f"{key} ({kind})" if kind else key for key, kind in self._top.items() if kind != "tensor"]
        if tensors:
            parts.insert(0, f"{_tensors(len(tensors))} ({listed(tensors)})")
        text = listed(parts, 12) if parts else "no named entries"
        if not tensors and self.leaves:
            container = self._largest()
            names = [leaf.name for leaf in self.leaves if leaf.container == container]
            text += f"; in {container.removesuffix('.')}: {listed(names)}"
        return text

    def _largest(self) -> str:
        counts = Counter(leaf.container for leaf in self.leaves)
        most = max(counts.values())
        equal = [container for container, count in counts.items() if count >= most - 1]  # an average may add n_averaged
        return next((container for container in equal if _AVERAGE.search(container)), equal[0])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns the dictionary with the most tensors, preferring averaged weights, without wrapper prefixes."""
        container = self._largest()
        tensors = {leaf.name: leaf.tensor for leaf in self.leaves if leaf.container == container}
        names = {name: _WRAPPERS.sub("", name) for name in tensors if name != "n_averaged"}
        if len(set(names.values())) < len(names):
            names = {name: name for name in tensors}
        return {new: tensors[name].array() for name, new in names.items()}

    def choose(self, shapes: Mapping[str, tuple[int, ...]], rename: Any = str, wanted: str = "") -> Choice:
        """Returns the tensors that match a network best.

        Args:
            shapes: shapes of the network's tensors, by the names in its state dict.
            rename: function that converts names of older files to current ones.
            wanted: label requested by the user; "." for the top level, "" for none.

        Raises:
            ValueError: nothing under `wanted` matches; the message lists the contents.
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
        equal = [prefix for prefix in equal if not _OPTIMIZER.search(prefix)] or equal  # its state has their names
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
    """Returns the scores of the prefixes that start with the wanted one; "." is the top level."""
    if wanted in (".", ""):
        return {prefix: score for prefix, score in scores.items() if not prefix}
    return {prefix: score for prefix, score in scores.items() if prefix.startswith(wanted)}


def _fits(given: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Returns whether shapes match; a convolution over a whole map matches a fully connected layer."""
    whole = len(expected) == 2 and len(given) == 4 and (given[0], math.prod(given[1:])) == expected
    return given == expected or whole


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the keys and entries of a container; nothing for other values."""
    if isinstance(value, StandIn):
        value = value.items
    if isinstance(value, dict):  # call the class's own method: a pickle may have set another on the object
        yield from ((str(key), entry) for key, entry in dict.items(value))
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), entry) for i, entry in enumerate(value))
