"""python -m gnp.evaluate: the test error and the gradient norm of a checkpoint."""

import json

from gnp import config as gnp_config
from gnp import environment
from gnp.command_line import Parser, directory, run
from gnp.errors import UserError


def main() -> int:
    """Parses the flags, evaluates, and prints."""
    parser = Parser("gnp.evaluate", "The error, loss and gradient norm of a run's checkpoint.")
    parser.add_argument("--workdir", required=True, type=directory, help="the run's directory")
    parser.add_argument("--step", help="which checkpoint, or best; by default the newest")
    parser.add_argument("--data_dir", help="where the data set is, if not where the run had it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args()
    path = flags.workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{flags.workdir} is not a work directory: it has no config.json")
    environment.set_up()
    config = gnp_config.from_json(path.read_text(), where=str(path))
    if flags.data_dir:
        config.data.data_dir = flags.data_dir

    # Here, since JAX is slow to import.
    from gnp.training.evaluation import evaluate_checkpoint, find_step
    from gnp.training.metrics import headline, text

    step = find_step(config, flags.workdir, flags.step)
    values = evaluate_checkpoint(config, flags.workdir, step=step)
    if flags.json:
        print(json.dumps(values))
        return 0
    print(f"{flags.workdir}, step {values['step']}")
    for split, of_split in values.items():
        if not isinstance(of_split, dict):
            continue
        more = ""
        if "top5_error" in of_split:
            more = f"top-5 error {text(of_split['top5_error'], '.2%')}, "
        if "ema_error" in of_split and "perplexity" not in of_split:
            more += f"of the average {text(of_split['ema_error'], '.2%')}, "
        print(
            f"{split:>6}: {' '.join(headline(of_split))}, {more}"
            f"loss {text(of_split['loss'], '.4f')}, "
            f"gradient norm {text(of_split['grad_norm'], '.4g')} "
            f"({of_split['num_examples']:,} {values['unit']}s)"
        )
    return 0


if __name__ == "__main__":
    run(main)
