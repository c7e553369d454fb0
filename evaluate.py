"""Evaluates a checkpoint of a run on a split of its data set.

python evaluate.py --workdir=DIR [--checkpoint=best|latest|STEP] [--split=NAME] [--weights=ema|raw] [--json]
"""

import json

from hga_flax.command_line import add_import_flag, add_weights_flag
from hga_flax.errors import ArgumentParser, run_main
from hga_flax.training import distributed


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the folder that train.py was given")
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|STEP", help="which one (default: best)")
    parser.add_argument("--split", metavar="NAME", help="default: the run's data.eval_split")
    add_weights_flag(parser)
    parser.add_argument("--data-dir", metavar="DIR", help="where the data set lies now; default: the run's data.dir")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once; default: the run's")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    add_import_flag(parser)
    distributed.add_flags(parser)
    arguments = parser.parse_args()

    import jax

    from hga_flax.training.console import Console  # after the arguments: --help and mistakes answer at once
    from hga_flax.training.metrics import finite_or_none
    from hga_flax.training.restore import configure_for, evaluate_workdir
    from hga_flax.training.twin import find
    from hga_flax.training.workdir import read_config

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
    if jax.process_index():
        return  # process 0 tells
    average = ", moving average of the weights" if result["weights"] == "ema" else ""
    rows = [
        ("checkpoint", f"step {result['step']} of {arguments.workdir}{average}"),
        ("split", f"{result['split']}, {result['num_examples']:,} images"),
        ("top-1 error", f"{result['top1_error']:.2f} %"),
        *([("top-5 error", f"{result['top5_error']:.2f} %")] if "top5_error" in result else []),
        ("loss", f"{result['loss']:.4f}"),
    ]
    Console().table("evaluation", rows)
    if arguments.json:
        print(
            json.dumps(
                result | finite_or_none({name: result[name] for name in result if name == "loss" or "_error" in name})
            )
        )


if __name__ == "__main__":
    run_main(main)
