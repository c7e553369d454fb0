"""Evaluates a run's checkpoint, or a file of weights, on a split of a data set.

python evaluate.py --workdir=DIR [--checkpoint=best|latest|STEP] [--split=NAME] [--weights=ema|raw] [--json]
python evaluate.py --weights=FILE --model=NAME [--attention=NAME] --config=FILE [--config.key=value ...] [--json]
"""

import json

from hga_flax.config.command_line import add_import_flag, add_weights_flags, names_weights, parse_with_weights
from hga_flax.errors import ArgumentParser, UserError, run_main
from hga_flax.processes.huge_pages import use_huge_pages


def main() -> None:
    from hga_flax.processes import distributed  # imported late, so that huge pages cost no time

    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add_weights_flags(parser)
    parser.add_argument(
        "--checkpoint", default="best", metavar="best|latest|STEP", help="checkpoint to load (default: best)"
    )
    parser.add_argument("--split", metavar="NAME", help="split to evaluate (default: the run's data.eval_split)")
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder of the data set, if it has moved (default: the run's data.dir)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="batch size (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    add_import_flag(parser)
    distributed.add_flags(parser)
    arguments = parse_with_weights(parser)
    if names_weights(arguments):
        evaluate_weights(arguments)
        return

    from hga_flax.runs.local_copy import find
    from hga_flax.runs.workdir import read_config
    from hga_flax.training.restore import configure_for, evaluate_workdir  # imported late, so that --help is quick

    config = read_config(find(arguments.workdir, light=True))
    distributed.start(arguments, config)
    configure_for(arguments.workdir)
    result = distributed.together(
        config,
        lambda: evaluate_workdir(
            arguments.workdir,
            arguments.checkpoint,
            arguments.split,
            arguments.data_dir,
            arguments.batch_size,
            arguments.weights,
        ),
        train=False,
    )
    average = ", moving average of the weights" if result["weights"] == "ema" else ""
    show([("checkpoint", f"step {result['step']} of {arguments.workdir}{average}")], result, arguments.json)


def evaluate_weights(arguments) -> None:
    """Evaluates `--weights=FILE` on the data set that `--config` names."""
    import jax

    from hga_flax.config.loading import load_config, override
    from hga_flax.inference.from_weights import describe_weights, restore_given
    from hga_flax.processes import distributed
    from hga_flax.runs.console import Console
    from hga_flax.runs.workdir import read_config
    from hga_flax.training.restore import evaluate_restored
    from hga_flax.training.weights_source import locate

    if arguments.config:
        config = load_config(arguments.config)
    elif (folder := locate(arguments.weights, "--weights")[0]).is_dir():
        config = read_config(folder)
    else:
        raise UserError("--config=FILE is missing: it names the data set to evaluate on, such as configs/cifar10.py")
    overrides = list(arguments.overrides)
    if arguments.data_dir is not None:
        overrides.append(f"--config.data.dir={arguments.data_dir}")
    distributed.start(arguments, override(config, overrides))
    restored = restore_given(arguments, overrides, data=True, batch_size=arguments.batch_size)
    config = restored.experiment.config
    Console(active=jax.process_index() == 0).table("weights", describe_weights(restored))
    result = distributed.together(config, lambda: evaluate_restored(restored, arguments.split), train=False)
    show([], result | {"weights": arguments.weights, "model": config.model.name}, arguments.json)


def show(rows: list[tuple[str, str]], result: dict, as_json: bool) -> None:
    """Prints the result, in process 0 only."""
    import jax

    from hga_flax.runs.console import Console
    from hga_flax.runs.writers import finite_or_none

    if jax.process_index():
        return
    rows += [
        ("split", f"{result['split']}, {result['num_examples']:,} images"),
        ("top-1 error", f"{result['top1_error']:.2f} %"),
        *([("top-5 error", f"{result['top5_error']:.2f} %")] if "top5_error" in result else []),
        ("loss", f"{result['loss']:.4f}"),
    ]
    Console().table("evaluation", rows)
    if as_json:
        print(
            json.dumps(
                result | finite_or_none({name: result[name] for name in result if name == "loss" or "_error" in name})
            )
        )


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
