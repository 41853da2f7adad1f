"""A run of very many steps in one process: nothing of what it holds grows with their number."""

import json
import os
import statistics
import subprocess
import sys

import pytest

from tests.runs import ROOT, num_rows

STEPS = 20_000

# In a process of its own, which holds nothing else. Measured at each row of the test split.
PROGRAM = """
import ctypes, json, os, pathlib, sys, time
import jax
from gnp import config as gnp_config
from gnp.training import train

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **about: compiled.append(about.get("fun_name"))
    if event == "/jax/core/compile/backend_compile_duration" else None
)
workdir, flags = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
config = gnp_config.load("configs/digits.py", flags)
samples = []

def on_row(row):
    if row["split"] != "test":
        return
    ctypes.CDLL(None).malloc_trim(0)  # else what is lost fills what compilation has left
    arrays = jax.live_arrays()
    samples.append({
        "step": row["step"],
        "seconds": time.monotonic(),
        "rss": int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "arrays": len(arrays),
        "array_bytes": sum(x.nbytes for x in arrays),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "compiled": len(compiled),
        "checkpoints": len(os.listdir(workdir / "checkpoints")),
        "others": sorted(p.name for p in workdir.iterdir() if not p.name.startswith("events.")),
    })

result = train(config, workdir, on_row=on_row)
print(json.dumps({"samples": samples, "result": result, "compiled": compiled}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="what a process holds: Linux")
def test_very_many_steps(tmp_path):
    flags = {
        "epochs": STEPS / (1437 / 10),
        "steps_per_call": 25,
        "log.every": "100st",
        "eval.every": "500st",
        "checkpoint.every": "1000st",
        "checkpoint.best": "test/loss",
        "data.batch_size": 10,
        "mesh.data": 1,
        "ema.decay": 0.99,
        "model.width": 4,
        "model.depth": 1,
        "model.num_heads": 1,
        "model.dropout": 0.1,
    }
    workdir = tmp_path / "run"
    pairs = [(name, str(value)) for name, value in flags.items()]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(workdir), json.dumps(pairs)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},  # optimised: many times as quick
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    samples, result = found["samples"], found["result"]
    assert result["steps"] == STEPS
    assert result["compilations"] == 1
    # All there is has been compiled when the run has evaluated and saved twice.
    begun = [sample for sample in samples if sample["step"] >= 1000]
    late = found["compiled"][begun[0]["compiled"] : begun[-1]["compiled"]]
    assert late == []

    quarter = len(begun) // 4
    first, last = begun[:quarter], begun[-quarter:]
    tell(first, last)
    # The least, since a save that is under way has more of everything. Pools of threads start them
    # as they need them; there are 10 saves and 20 evaluations in between, at least.
    for name, more in (("arrays", 0), ("array_bytes", 0), ("files", 0), ("threads", 4)):
        before, after = (min(sample[name] for sample in part) for part in (first, last))
        assert after <= before + more, f"{name}: {before}, then {after}"
    assert all(sample["checkpoints"] <= 4 for sample in begun)  # the newest two, the best, the next
    assert all(sample["others"] == first[0]["others"] for sample in begun)
    # What is lost at each step is lost in each quarter; a pool that grows once is in one of them.
    # Each row is kept, in some 3 kB, and a save of Orbax's leaves 0.1 MB; beside that, 1 kB a step
    # would be a leak.
    parts = [begun[i * quarter : (i + 1) * quarter] for i in range(4)]
    grown = min(part[-1]["rss"] - part[0]["rss"] for part in parts)
    allowed = (3e3 * num_rows(workdir) + 100e3 * (STEPS / 1000) + 1e3 * STEPS) / 4
    assert grown < allowed, f"{grown / 1e6:.1f} MB in a quarter"


def tell(first, last):
    """Prints what is not asserted: figures for a person who looks into it."""
    print([round(sample["rss"] / 1e6, 1) for sample in (*first, *last)])
    for name in ("rss", "arrays", "array_bytes", "files", "threads", "checkpoints"):
        print(name, *(statistics.median(x[name] for x in part) for part in (first, last)))
    for part in (first, last):
        steps, seconds = (part[-1][name] - part[0][name] for name in ("step", "seconds"))
        print(f"{1e3 * seconds / steps:.3f} ms a step")
