"""The benchmarks run and write what they measure. The figures themselves are a quiet machine's."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from gnp.data.streaming import default_num_workers

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


def rows_of(name, path, *flags, at_least=()):
    """What a small run writes, checked for what all benchmarks share.

    The targets of the rows `at_least` are the least that a value may be, the others' the most.
    """
    done = bench(name, "--quick", "--rounds=1", "--seconds=0", *flags, f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert set(row) in ({"name", "value", "unit"}, {"name", "value", "unit", "target", "met"})
        assert math.isfinite(row["value"])
        if "met" in row:
            difference = row["value"] - row["target"]
            assert row["met"] == (difference >= 0 if row["name"] in at_least else difference <= 0)
        assert row["name"] in done.stdout
    assert len({row["name"] for row in rows}) == len(rows)
    return rows


@pytest.mark.slow
def test_transforms(tmp_path):
    sizes = ("--batch_size=2", "--width=8", "--depth=1", "--num_heads=1")
    rows = rows_of("transforms", tmp_path / "rows.jsonl", *sizes)
    for row in rows:
        assert row["unit"] in ("ratio", "ms", "copies of the parameters")
        assert row["value"] > 0 or "above plain" in row["name"]
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


@pytest.mark.parametrize(("family", "model"), [("vit", "vit_ti"), ("vgg", "vgg16_bn")])
def test_models(tmp_path, family, model):
    """Runs only if the block is the same computation as the bare one."""
    rows = rows_of("models", tmp_path / "rows.jsonl", f"--family={family}", "--batch_size=1")
    block = f"{family} block"
    targets = {row["name"]: row["target"] for row in rows if "target" in row}
    assert targets == {
        f"{block}: a step, ours / bare": 1.03,
        f"{block}: temporary memory, ours / bare": 1.03,
    }
    units = {"compile time": "s", "a step": "ms", "temporary memory": "MiB"}
    pairs = [(block, "ours", "bare")]
    if family == "vit":
        pairs.append((model, "scanned", "unrolled"))
    expected = {f"{model}: compile time": "s"} if family == "vgg" else {}
    for name, a, b in pairs:
        for what, unit in units.items():
            expected[f"{name}: {what}, {a} / {b}"] = "ratio"
            expected |= {f"{name}: {what}, {of}": unit for of in (a, b)}
    assert {row["name"]: row["unit"] for row in rows} == expected
    assert all(row["value"] > 0 for row in rows)


STREAMED = f"JPEGs streamed / ({default_num_workers()} x Pillow in a loop)"


@pytest.mark.parametrize(
    ("parts", "targets"),
    [
        pytest.param(
            "jpeg,cifar,step",
            {
                STREAMED: 0.9,
                "second start, the cache filled": 2.0,
                "small ViT: the pipeline's share of a step": 3.0,
            },
            id="data",
            marks=pytest.mark.slow,  # images are written, workers started
        ),
        pytest.param(
            "heavy,calls",
            {"small ViT: Python in calls of 16": 1.0},
            id="calls",
            marks=pytest.mark.slow,  # compiling
        ),
    ],
)
def test_data(tmp_path, parts, targets):
    sizes = ("--images=100", "--batch_size=8", "--depth=1")
    sizes += ("--jpegs=10", "--pngs=10", "--batches=1", "--starts=1", f"--parts={parts}")
    rows = rows_of("data", tmp_path / "rows.jsonl", *sizes, at_least=[STREAMED])
    for row in rows:
        assert row["unit"] in ("ratio", "%", "images/s", "s", "ms")
        assert row["value"] > 0 or row["unit"] == "%"  # a difference
    assert {row["name"]: row["target"] for row in rows if "target" in row} == targets


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    heads = "model.num_heads 2 does not divide model.width 7"
    for name, flags, message in (
        ("transforms", ["--rounds=0"], "--rounds must be 1 or more, got 0"),
        ("transforms", [f"--json={tmp_path / 'no' / 'rows.jsonl'}"], "--json: cannot write"),
        ("transforms", ["--width=7", "--num_heads=2"], heads),
        ("models", ["--family=vti"], "unknown family 'vti'; did you mean 'vit'?"),
        ("data", ["--parts=step,jpg"], "unknown part 'jpg'; did you mean 'jpeg'?"),
    ):
        done = bench(name, "--quick", *flags)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
