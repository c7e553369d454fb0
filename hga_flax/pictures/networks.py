"""`python -m hga_flax networks`: every network's size and cost, plain and with an attention.

The counts are for one image and 1000 classes and come from tracing the networks (`complexity.py`), without running
them. They say nothing about accuracy.
"""

import argparse
import fnmatch
import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from hga_flax.attention import attention_factory, replaces_convolution
from hga_flax.config.command_line import add_import_flag
from hga_flax.counting.complexity import complexity
from hga_flax.errors import UserError, nearest
from hga_flax.models import create_model, model_names

SIZE = 224


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="networks or patterns such as 'res2net*' (default: all)"
    )
    parser.add_argument("--attention", default="hga", metavar="NAME", help="attention to add (default: hga)")
    parser.add_argument(
        "--image-size",
        type=int,
        default=SIZE,
        metavar="N",
        help=f"height and width of the image in pixels (default: {SIZE})",
    )
    add_import_flag(parser)
    parser.add_argument("--json", action="store_true", help="print a list of rows as JSON instead")


def run(arguments: argparse.Namespace) -> None:
    """Prints a row for each network.

    Raises:
        UserError: a network or the attention is unknown, or the image is too small.
    """
    jax.config.update("jax_platforms", "cpu")  # tracing needs no accelerator, so do not occupy one
    try:
        replaces = replaces_convolution(attention_factory(arguments.attention))
    except ValueError as error:
        raise UserError(str(error)) from None
    rows = []
    for name in chosen(arguments.names):
        model = create_model(name)
        if arguments.image_size < model.stride:
            raise UserError(f"--image-size={arguments.image_size}: {name} needs at least {model.stride}")
        if not replaces or getattr(model, "hosts_convolution", False):
            rows.append(row(name, arguments.attention, arguments.image_size))
            if not arguments.json:
                new = lines(rows)[-1:] if len(rows) > 1 else lines(rows)  # the head comes with the first row
                print(*new, sep="\n", flush=True)
    if not rows:
        raise UserError(f"--attention={arguments.attention}: none of these networks has a place for it")
    if arguments.json:
        print(json.dumps(rows, indent=1))


def chosen(patterns: Iterable[str]) -> list[str]:
    """Returns the networks that match any of the patterns, in the order of `model_names`; all if there are none.

    Networks that `model_names` does not list, such as "cifar_resnet20", are found by their whole names.

    Raises:
        UserError: a pattern matches no network.
    """
    names, patterns = model_names(), list(patterns)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern) and _is_network(pattern):
            names.append(pattern)
        if not fnmatch.filter(names, pattern):
            raise UserError(f"no network is called '{pattern}'{nearest(pattern, names)}; without names, all are listed")
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _is_network(name: str) -> bool:
    try:
        create_model(name)
    except ValueError:
        return False
    return True


def row(name: str, attention: str, size: int = SIZE) -> dict[str, Any]:
    """Returns the size and cost of a network, plain and with an attention."""
    plain = complexity(create_model(name), (size, size, 3))
    try:
        whole = complexity(create_model(name, attention=attention), (size, size, 3))
    except ValueError as error:
        raise UserError(f"--attention={attention}: {error}") from None
    return {
        "network": name,
        "attention": attention,
        "image_size": size,
        "params": plain.params,
        "conv_fc_macs": plain.conv_fc_macs,
        "gflops": plain.gflops,
        "added_params": whole.params - plain.params,
        "added_conv_fc_macs": whole.conv_fc_macs - plain.conv_fc_macs,
        "added_gflops": whole.gflops - plain.gflops,
    }


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Formats the rows as an aligned Markdown table."""
    attention = rows[0]["attention"]
    head = ("network", "parameters", "GMACs", f"{attention}: parameters", "", f"{attention}: GMACs", "")
    cells = [
        (
            f"`{r['network']}`",
            f"{r['params']:,}",
            f"{r['conv_fc_macs'] / 1e9:.3f}",
            f"{r['added_params']:+,}",
            f"{r['added_params'] / r['params']:+.1%}",
            f"{r['added_conv_fc_macs'] / 1e9:+.4f}",
            f"{r['added_conv_fc_macs'] / r['conv_fc_macs']:+.1%}",
        )
        for r in rows
    ]
    widths = (22, 11, 7, max(12, len(head[3])), 6, max(8, len(head[5])), 6)
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return [_line(head, widths), rule, *(_line(row, widths) for row in cells)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return " | ".join([f"| {first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]) + " |"
