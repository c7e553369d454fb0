"""What every command's arguments have in common; imports nothing, so that a command decides what it needs."""

from collections.abc import Sequence


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divides a command's arguments into its own and the `--config.key=value` among them."""
    own: list[str] = []
    overrides: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--config."):
            own.append(argument)
            continue
        if "=" not in argument and pending and not pending[0].startswith("--"):
            argument += "=" + pending.pop(0)  # "--config.key value"
        overrides.append(argument)
    return own, overrides
