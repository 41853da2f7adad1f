"""The benchmarks run and write what they measure. The figures themselves are a quiet machine's."""

import json
import math
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


# What is compiled here need not be fast.
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_backend_optimization_level=0"
}


def bench(name, *flags):
    return subprocess.run(
        [sys.executable, f"scripts/bench_{name}.py", *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_transforms(tmp_path):
    path = tmp_path / "rows.jsonl"
    sizes = ("--batch_size=2", "--width=8", "--depth=1", "--num_heads=1")
    done = bench("transforms", "--quick", "--rounds=1", "--seconds=0", *sizes, f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert set(row) in ({"name", "value", "unit"}, {"name", "value", "unit", "target", "met"})
        assert math.isfinite(row["value"])
        assert row["unit"] in ("ratio", "ms", "copies of the parameters")
        assert row["value"] > 0 or "above plain" in row["name"]
        assert "met" not in row or row["met"] == (row["value"] <= row["target"])
        assert row["name"] in done.stdout
    assert len({row["name"] for row in rows}) == len(rows)
    targets = {row["name"]: row["target"] for row in rows if "target" in row}
    memory = "temporary memory above plain"
    assert targets == {
        "GR α = 0.5 / plain": 2.05,
        "GR α = 1 / plain": 2.05,
        "zero-warmup, in the warmup / plain": 1.03,
        "AdamS / AdamW": 1.01,
        f"GR α = 0.5: {memory}": 2.0,
        f"GR α = 1: {memory}": 2.0,
        f"zero-warmup: {memory}": 2.0,
    }


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    for flags, message in (
        (["--rounds=0"], "--rounds must be 1 or more, got 0"),
        ([f"--json={tmp_path / 'no' / 'rows.jsonl'}"], "--json: cannot write"),
        (["--width=7", "--num_heads=2"], "model.num_heads 2 does not divide model.width 7"),
    ):
        done = bench("transforms", "--quick", *flags)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
