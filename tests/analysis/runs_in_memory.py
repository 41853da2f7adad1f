"""Runs of known values that no file holds."""

import json
import pathlib

import numpy as np
from etils import epath

from gnp.analysis.runs import Run

SECTIONS = ("model", "data", "optimizer", "weight_decay", "lr", "gr")


def made_run(
    seed=0, rows=10, shift=0.0, text=False, diverges=None, ended=True, workdir="/runs/a", **fields
):
    """A run whose values are straight lines in the epoch.

    Args:
      seed: its seed.
      rows: of each split, evenly spaced over its epochs of 100 steps.
      shift: added to its test error (and, times 100, to its perplexity) and its gradient norm.
      text: whether it is of a language model.
      diverges: the epoch after which nothing is finite; None for never.
      ended: whether it has a result.
      workdir: what it calls its directory.
      **fields: of its configuration, as gr_policy="zero".
    """
    config = {
        "seed": seed,
        "epochs": fields.pop("epochs", 10.0),
        "model": {"name": "vit_ti"},
        "data": {"name": "cifar10"},
        "optimizer": {"name": "adam"},
        "weight_decay": {"kind": "none", "value": 0.0},
        "lr": {"base": 0.001, "schedule": "cosine", "warmup": "2ep"},
        "gr": {"policy": "off", "radius": 0.1, "ratio": 1.0},
    }
    for name, value in fields.items():
        (section,) = (part for part in SECTIONS if name.startswith(f"{part}_"))
        config[section][name.removeprefix(f"{section}_")] = value
    epoch = config["epochs"] * np.arange(1, rows + 1) / rows
    left = 1 - epoch / config["epochs"]  # from 1 to 0
    train = {
        "loss": 0.3 + 2 * left,
        "error": 0.1 + 0.6 * left,
        "grad_norm": 1 + shift + 4 * left,
        "weight_norm": 50 - left,
        "learning_rate": 0.001 * left,
        "adaptive_lr_log_std": 1 + shift + left,
    }
    test = {"loss": 0.5 + 2 * left, "error": 0.2 + shift + 0.6 * left}
    if text:
        test["perplexity"] = 100 * (1 + shift + left)
    if config["gr"]["policy"] != "off":
        train |= {"radius": np.full(rows, 0.1), "ratio": np.ones(rows)}
    if config["weight_decay"]["kind"] == "scheduled":
        train["swd_factor"] = 100 / train["grad_norm"]
    metrics = {"train": train, "test": test}
    if diverges is not None:
        for columns in metrics.values():
            columns |= {k: np.where(epoch > diverges, np.nan, v) for k, v in columns.items()}
    result = {split: {k: _number(v[-1]) for k, v in of.items()} for split, of in metrics.items()}
    at = {"step": 100 * epoch, "epoch": epoch}
    return Run(
        epath.Path(workdir),
        config,
        {split: at | columns for split, columns in metrics.items()},
        result if ended else None,
    )


def _number(value):
    """As JSON has it."""
    return None if np.isnan(value) else float(value)


def measured_run(folder: pathlib.Path, scale=1.0, epochs=(0.0, 5.0, 10.0), settings=None, **fields):
    """A run with a sharpness.jsonl: at these epochs, its values times `scale`, by `settings`.

    In a folder that has one, the rows come after those that are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    grid = [-1.0, 0.0, 1.0]
    surface = [[scale * (1 + x * x + 2 * y * y) for x in grid] for y in grid]
    with (folder / "sharpness.jsonl").open("a") as file:
        for index, epoch in enumerate(epochs, start=1):
            row = {
                **{"step": int(100 * epoch), "epoch": epoch, "split": "train"},
                "settings": settings or {},
                **{"num_examples": 64, "loss": 1.0, "grad_norm": 1.0, "weight_norm": 1.0},
                "eigenvalues": [scale * index * value for value in (8.0, 4.0, 2.0, 1.0)],
                "eigenvalue_errors": [0.0] * 4,
                **{"trace": 15.0, "trace_error": 0.1},
                "density": {"eigenvalue": [0.0, 1.0, 2.0], "density": [0.5, scale * index, 0.0]},
                **{"sam_sharpness": scale * index, "radius": 0.05},
                "adaptive_lr_variance": 10 * scale * index,
                "adaptive_lr_spread": 20 * scale * index,
                "surface": {"x": grid, "y": grid, "loss": surface},
            }
            file.write(json.dumps(row) + "\n")
    return made_run(workdir=folder, **fields)
