"""The benchmarks run and write what they measure. The figures themselves are a quiet machine's."""

import importlib
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


@pytest.mark.soak
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


@pytest.mark.parametrize(
    ("family", "model"),
    [pytest.param("vit", "vit_ti", marks=pytest.mark.slow), ("vgg", "vgg16_bn")],
)
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
            marks=pytest.mark.soak,  # images are written, workers started
        ),
        pytest.param(
            "heavy,calls",
            {"small ViT: Python in calls of 16": 1.0},
            id="calls",
            marks=pytest.mark.soak,  # compiling
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


TINY = ("--batch_size=8", "--width=8", "--depth=1", "--num_heads=1")
TASK = "vit_ti at 32, float32, batch 8"


@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        pytest.param(["--parts=flops"], {}, id="flops", marks=pytest.mark.soak),
        pytest.param(
            ["--parts=loop,saving,methods"],
            {
                f"{TASK}: training loop / bare steps": 0.98,
                f"{TASK}: saves at one a minute": 0.02,
                f"{TASK}: GR / plain": 2.05,
                f"{TASK}: zero-warmup, in the warmup / plain": 1.03,
                f"{TASK}: SWD / AdamW": 1.01,
            },
            id="loop",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            ["--compare=torch"],
            {
                f"{TASK}: {method}, ours / PyTorch{which}": 1.0
                for method in ("plain", "SAM")
                for which in ("", ", of the least times")
            },
            id="torch",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_train(tmp_path, flags, targets):
    if "--compare=torch" in flags:
        pytest.importorskip("torch")
    at_least = [f"{TASK}: training loop / bare steps"]
    rows = rows_of("train", tmp_path / "rows.jsonl", *TINY, *flags, at_least=at_least)
    # What a save costs is a difference.
    assert all(row["value"] > 0 for row in rows if " save" not in row["name"])
    assert {row["name"]: row["target"] for row in rows if "target" in row} == targets


def test_a_pod_on_paper(tmp_path):
    rows = rows_of("train", tmp_path / "rows.jsonl", "--parts=pod")
    shares = [row["value"] for row in rows if row["unit"] == "% of a step"]
    assert len(shares) == 3 * 3 * 2  # chips, models, sizes of images
    assert all(0 < share < 50 for share in shares)
    given = ("--parts=pod", "--model=vit_b", "--chips=2", "--chip_flops=1e12", "--bandwidth=1e9")
    rows = rows_of("train", tmp_path / "rows.jsonl", *given)
    # 2 (n - 1)/n times 4 bytes for each of the parameters, of which the model has 85,152,010.
    assert next(row["value"] for row in rows if row["unit"] == "ms") == pytest.approx(340.608)


@pytest.mark.soak  # four processes
def test_scaling(tmp_path):
    """What 8 devices exchange is known: it is met on any machine."""
    rows = rows_of("train", tmp_path / "rows.jsonl", *TINY, "--parts=scaling")
    values = {row["name"]: row["value"] for row in rows}
    for method, sizes in (("plain", 1), ("GR", 2), ("GR, a group a device", 1)):
        row = next(r for r in rows if r["name"] == f"{TASK}: {method}: arrays exchanged")
        assert row["met"] and row["value"] == row["target"] == sizes
        assert values[f"{TASK}: {method}: scalars exchanged"] < 100
    for devices in (2, 4, 8):
        assert values[f"{TASK}: a step on {devices} forced devices / on 1"] > 0


@pytest.mark.parametrize(
    "parts",
    ["steps", "runs"],  # the latter are six runs from nothing
)
@pytest.mark.soak
def test_sweep(tmp_path, parts):
    sizes = ("--seeds=2", "--epochs=0.1", f"--parts={parts}")
    rows = rows_of("sweep", tmp_path / "rows.jsonl", *sizes)
    assert len(rows) == {"steps": 1, "runs": 3}[parts]
    for row in rows:
        assert row["value"] > 0 and row["unit"] == ("s" if row["name"].endswith("vmapped") else "")


PROGRAM = """
  %x = f32[8]{0} parameter(0), metadata={op_name="all-reduce(" }
  %all-reduce.3 = (f32[2,3]{1,0:T(8,128)}, bf16[10]{0}, /*index=2*/f32[]) all-reduce(%a, %b, %c)
  %all-gather-start.1 = (f32[4]{0}, f32[32]{0}) all-gather-start(%a), dimensions={0}
  %all-gather-done.1 = f32[32]{0} all-gather-done(%all-gather-start.1)
  ROOT %all-to-all = pred[16]{0} all-to-all(%d), dimensions={0}
  %done = f32[] get-tuple-element(%all-reduce.3), index=2
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def test_collectives_of_a_program(scripts):
    found = scripts("bench_collectives").collectives(PROGRAM)
    assert found == [("all-reduce", 44, 4), ("all-gather", 128, 0), ("all-to-all", 16, 0)]


@pytest.mark.soak
def test_utilization(scripts, monkeypatch):
    bench_train = scripts("bench_train")
    rates = iter([1e9, 3e9])
    monkeypatch.setattr(bench_train, "matmul_rate", lambda dtype: next(rates))
    monkeypatch.setattr(scripts("benchmark"), "pairs", lambda *_: [(0.02, 0.01)])
    case = scripts("train_steps").Case("vit_b", 32, "float32")
    sizes = {"width": 8, "depth": 1, "num_heads": 1, "batch_size": 8, "rounds": 1, "seconds": 0.0}
    (rows,) = bench_train.measure_flops(case, sizes)
    rows = {row.name: row for row in rows}
    label = "vit_b at 32, float32, batch 8"
    # Multiply-adds of an image: patches, 2 products with 64 patches and a class token, the head.
    qkv_and_mlp = 65 * 8 * (3 * 8 + 8 + 2 * 32)
    adds = 64 * 48 * 8 + qkv_and_mlp + 2 * 65 * 65 * 8 + 8 * 10
    for method, gradients, seconds in (("plain", 1, 0.01), ("GR", 2, 0.02)):
        flops = 3 * gradients * 8 * 2 * adds
        row = rows[f"{label}: {method}"]
        assert row.value == pytest.approx(flops / seconds / 2e9)
        assert row.target == 0.6 and row.at_least
    assert rows[f"{label}: matrix products"].value == pytest.approx(2e-3)


def test_a_batch_is_halved_until_it_fits(scripts, monkeypatch, capsys):
    bench_train = scripts("bench_train")
    case = scripts("train_steps").Case("vit_ti", 32, "float32")
    tried = []

    def steps(task, config):
        tried.append(task.batch_size)
        if task.batch_size > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        raise RuntimeError("another")

    monkeypatch.setattr(bench_train, "OurSteps", steps)
    with pytest.raises(RuntimeError, match="another"):
        bench_train.times_that_fit(case, 8, {"depth": 1})
    assert tried == [8, 4, 2]
    assert "vit_ti at 32: out of memory, trying 2" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):  # a batch that was asked for
        bench_train.times_that_fit(case, 8, {"depth": 1, "batch_size": 8})
    with scripts("train_steps").skipped_if_too_large("flops"):
        raise MemoryError("9 GiB wanted")
    assert "flops: skipped, out of memory (9 GiB wanted)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    heads = "model.num_heads 2 does not divide model.width 7"
    for name, flags, message in (
        ("transforms", ["--rounds=0"], "--rounds must be 1 or more, got 0"),
        ("transforms", [f"--json={tmp_path / 'no' / 'rows.jsonl'}"], "--json: cannot write"),
        ("transforms", ["--width=7", "--num_heads=2"], heads),
        ("models", ["--family=vti"], "unknown family 'vti'; did you mean 'vit'?"),
        ("data", ["--parts=step,jpg"], "unknown part 'jpg'; did you mean 'jpeg'?"),
        ("train", ["--parts=loop,scal"], "unknown part 'scal'; did you mean 'scaling'?"),
        ("train", ["--parts=scaling", "--batch_size=12"], "--batch_size is 12, which 8 devices"),
    ):
        done = bench(name, "--quick", *flags)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
