"""Takes the place of `python -m gnp.train` where a test wants many trials and no training.

It writes what a run writes: config.json, a row of metrics an epoch, result.json. The error goes in
equal steps from 1 to |log10(lr.base) + 3| / 10 + 0.001 seed. `gr.policy` says what goes wrong:
"lambda" ends with a user's mistake, "r" with a traceback, "none" waits for SIGTERM after one row.
"""

import json
import math
import os
import pathlib
import signal
import sys
import time

from gnp import config as gnp_config
from gnp.sweeps import after


def stop(number, frame):
    if "STAND_IN_STUBBORN" in os.environ:
        return
    print("saved", flush=True)
    os._exit(75)


def train(config, workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with open(workdir / "starts.jsonl", "a") as file:  # which a run does not write
        start = {"process": os.getpid(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}
        if hasattr(os, "sched_getaffinity"):
            start["cores"] = sorted(os.sched_getaffinity(0))
        file.write(json.dumps(start) + "\n")
    last = abs(math.log10(config.lr.base) + 3) / 10 + config.seed / 1000
    epochs = int(config.epochs)
    for epoch in range(1, epochs + 1):
        error = 1 + (last - 1) * epoch / epochs
        with open(workdir / "metrics.jsonl", "a") as file:
            row = {"split": "test", "step": epoch, "epoch": float(epoch), "error": error}
            file.write(json.dumps(row) + "\n")
        if config.gr.policy == "lambda":
            sys.exit("warning: something\nerror: the disk is full\n")
        if config.gr.policy == "r":
            raise ArithmeticError("first\n  second")
        if config.gr.policy == "none":
            time.sleep(60)
        time.sleep(float(os.environ.get("STAND_IN_SECONDS", 0)))
    result = {"test": {"error": last, "loss": None}, "steps": epochs, "wall_time": 1.0}
    (workdir / "result.json").write_text(json.dumps(result))


def train_together(file, *flags):
    """As gnp.sweeps.group; trials of one policy go together."""
    trials = json.loads(pathlib.Path(file).read_text())
    if flags:
        policies = [trial["config"]["gr"]["policy"] for trial in trials]
        groups = [
            [i for i, x in enumerate(policies) if x == policy] for policy in dict.fromkeys(policies)
        ]
        print(json.dumps(groups))
        return
    for trial in trials:
        config = gnp_config.from_json(json.dumps(trial["config"]), where=file)
        if config.lr.base > 1:
            print(f"error: {trial['name']}: a loss is not finite", flush=True)
        else:
            train(config, pathlib.Path(trial["workdir"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    module, *arguments = sys.argv[2:]
    if module == "gnp.sweeps.after":
        sys.argv = [module, *arguments]
        sys.exit(after.main())
    if module == "gnp.sweeps.group":
        sys.exit(train_together(*arguments))
    assert (sys.argv[1], module) == ("-m", "gnp.train"), sys.argv
    flags = dict(argument.partition("=")[::2] for argument in arguments)
    fields = [
        (flag.removeprefix("--config."), text)
        for flag, text in flags.items()
        if flag.startswith("--config.")
    ]
    train(gnp_config.load(flags["--config"], fields), pathlib.Path(flags["--workdir"]))
