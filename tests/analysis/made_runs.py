"""Work directories of runs that were never trained."""

import json
import math

from gnp import config
from gnp.analysis import runs

ENDED = {"unit": "image", "num_params": 5, "devices": "cpu × 1"}


def make(workdir, error=0.25, *, rows=10, steps=100, wall_time=100.0, speed=100.0, **fields):
    """Writes a run of ten epochs and reads it.

    Args:
      workdir: its work directory.
      error: the final test error; None for a run that has not ended, NaN for one that diverged.
      rows: epochs that it has logged.
      steps: optimizer steps of all epochs.
      wall_time: seconds.
      speed: images a second.
      **fields: the configuration's, with __ for the dot: gr__policy="zero".
    """
    settings = config.default()
    settings.update_from_flattened_dict(
        {"epochs": 10.0, **{name.replace("__", "."): value for name, value in fields.items()}}
    )
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(settings.to_dict()))
    lines = []
    for epoch in range(1, rows + 1):
        at = {"step": steps * epoch // 10, "epoch": float(epoch), "wall_time": 9.0 * epoch}
        broken = error is not None and math.isnan(error) and epoch == rows
        train = {"loss": None if broken else 1 / epoch, "grad_norm": 1.0}
        test = {"loss": 2 / epoch, "error": None if broken else 0.9 / epoch}
        lines += [at | {"split": "train"} | train, at | {"split": "test"} | test]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if error is not None:
        test = {"split": "test", "error": None if math.isnan(error) else error, "loss": 0.5}
        result = ENDED | {"steps": steps, "epochs": 10.0, "wall_time": wall_time, "test": test}
        result["speed"] = {"images_per_second": speed, "data_wait": 0.1}
        (workdir / "result.json").write_text(json.dumps(result))
    return runs.load(workdir)


def seeds(folder, errors, **fields):
    """Writes a run a test error, with the seeds 0, 1, and so on."""
    return [
        make(folder / f"seed-{seed}", error, seed=seed, **fields)
        for seed, error in enumerate(errors)
    ]
