"""Slots, failures, the table, what the terminal shows, and groups that are trained together."""

import io
import json
import math
import os
import pathlib
import statistics

import pytest
from rich.console import Console

from gnp import config as gnp_config
from gnp.analysis import comparison, runs
from gnp.errors import UserError
from gnp.sweeps import slots, summary
from gnp.sweeps.display import Display, Row, duration
from gnp.sweeps.processes import Ended, Job, Pool, failure
from gnp.sweeps.slots import Slot
from gnp.sweeps.trials import Trial

TRIAL = Trial("gr=off,seed=0", "gr=off", 0, gnp_config.default(), ())


# --- Slots --------------------------------------------------------------------------------------


def test_one_job_has_all(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert slots.make(1) == [Slot()]
    assert slots.make(1, "2,3") == [Slot(devices="2,3")]


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2, 5"}, ["2", "5"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a,MIG-2b"}, ["GPU-1a", "MIG-2b"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cuda,cpu"}, ["0"]),
        ({}, ["0", "1", "2"]),
    ],
)
def test_gpus_are_found(environ, names, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slots.find_gpus(environ) == names


def test_no_gpus_where_their_program_fails_or_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slots.find_gpus({}) == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    program.chmod(0o755)
    assert slots.find_gpus({}) == []


def test_devices_and_cores_are_divided(monkeypatch):
    parts = [slot.devices for slot in slots.make(3, "a,b,c,d,e,f,g")]
    assert parts == ["a,b", "c,d", "e,f,g"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {8, 1, 2, 4, 9})
    assert [slot.cores for slot in slots.make(2)] == [{1, 2}, {4, 8, 9}]
    assert slots.make(6) == [Slot()] * 6  # more than cores: they share them


def test_one_program_has_one_device(monkeypatch):
    three = slots.make(2, "a,b,c")
    assert [slot.devices for slot in slots.with_one_device(three)] == ["a", "b"]
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert slots.with_one_device(slots.make(1)) == [Slot("2")]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert slots.with_one_device(slots.make(1)) == [Slot()]


@pytest.mark.parametrize(
    ("jobs", "devices", "message"),
    [
        (2, "0", "--jobs=2, but there are 1 devices (0)"),
        (1, "0,0", "has a device twice"),
        (1, "0,,1", "write the GPUs' numbers"),
        (1, "", "write the GPUs' numbers"),
    ],
)
def test_wrong_devices(jobs, devices, message):
    with pytest.raises(UserError) as error:
        slots.make(jobs, devices)
    assert message in str(error.value)


# --- Failures -----------------------------------------------------------------------------------

TRACEBACK = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    f()
    ~^^
ValueError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in <module>
jax.errors.JaxRuntimeError: INTERNAL: \x1b[31mbad
--------------------
For simplicity, JAX has removed its internal frames from the traceback.
"""


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        ("error: earlier\nerror: the last\nwarning\n", 2, "the last"),
        (TRACEBACK, 1, "jax.errors.JaxRuntimeError: INTERNAL: \\x1b[31mbad"),
        (f"{TRACEBACK}error: told in one line\n", 2, "told in one line"),
        ("error: gr=off,seed=0: mine\nerror: gr=on,seed=0: another's\n", 2, "mine"),
        ("", -9, "ended by SIGKILL"),
        ("step 1\n", 7, "ended with exit code 7 and no result"),
        ("error: " + "x" * 10**6 + "\n", -11, "ended by SIGSEGV"),  # its beginning is not read
    ],
)
def test_why_a_trial_failed(tmp_path, log, code, reason):
    before = "error: of an earlier start\n"
    path = tmp_path / "log"
    path.write_text(before + log)
    ended = Ended(Job("name", (TRIAL,), [], path), code, len(before), 1.0)
    assert failure(ended, TRIAL) == reason


def test_a_job_that_cannot_be_started(tmp_path):
    for log, program in ((tmp_path / "no" / "log", "true"), (tmp_path / "log", "/no/program")):
        pool = Pool([Slot()])
        with pytest.raises(UserError, match=r"cannot start name: /.*: No such file"):
            pool.start(Job("name", (TRIAL,), [program], log))
        assert pool.has_room


# --- The table ----------------------------------------------------------------------------------


def metric_of(*overrides, asked=None, name="configs/digits.py"):
    root = pathlib.Path(__file__).parents[2]
    return summary.choose_metric(asked, gnp_config.load(str(root / name), overrides))


def test_the_metric():
    validation = ("data.validation", "train[90%:]")
    assert metric_of() == "test/error"
    assert metric_of(validation) == "validation/error"
    assert metric_of(name="configs/ptb_lstm.py") == "validation/perplexity"
    assert metric_of(validation, asked="test/loss") == "test/loss"
    assert metric_of(("ema.decay", "0.9"), asked="test/ema_error") == "test/ema_error"
    for asked in ("validation/error", "test/perplexity", "test/ema_error", "error", "test/eror"):
        with pytest.raises(UserError, match="unknown --metric"):
            metric_of(asked=asked)


def test_values_of_results():
    assert summary.value({"test": {"error": 0.25}}, "test/error") == 0.25
    for result in (None, {}, {"test": 3}, {"test": {"error": None}}, {"test": {"error": True}}):
        assert math.isnan(summary.value(result, "test/error"))


@pytest.mark.parametrize(
    ("train", "test", "has_diverged"),
    [
        ({"loss": 0.5}, {"error": 0.25}, False),
        ({"loss": None}, {"error": 0.25}, True),
        ({"loss": 0.5}, {"error": None}, True),
        ({"loss": 0.5}, {"error": 0.25, "perplexity": 9.0}, False),
        ({"loss": 0.5}, {"error": 0.25, "perplexity": None}, True),
    ],
)
def test_a_run_that_has_diverged_counts_here_as_in_reports(train, test, has_diverged, tmp_path):
    at = {"step": 1, "epoch": 1.0}
    rows = [{"split": "train", **at, **train}, {"split": "test", **at, **test}]
    result = {"train": train, "test": test, "validation": {"error": 0.125}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert comparison.has_diverged(runs.load(tmp_path)) == has_diverged
    for metric in ("test/error", "validation/error"):
        assert math.isnan(summary.value(result, metric)) == has_diverged


def test_settings_best_first_with_what_is_missing():
    values = [0.03125, 0.0625, 0.125]
    lines = [
        summary.line("b", [{"test": {"error": 0.5}}, None], "test/error"),
        summary.line("none", [None], "test/error"),
        summary.line("diverged", [{"test": {"error": None}}], "test/error"),
        summary.line("early", [{"test": {"error": 0.01}}, None, None], "test/error"),
        summary.line("c", [{"test": {"error": 0.75}}], "test/error"),
        summary.line("a", [{"test": {"error": x}} for x in values], "test/error"),
    ]
    mean, std = 100 * statistics.fmean(values), 100 * statistics.stdev(values)
    assert summary.table(lines, "test/error").splitlines() == [
        "setting   test/error     std  seeds",
        f"a             {mean:.2f} %  {std:.2f} %  3",
        "c            75.00 %       –  1",
        "early         1.00 %       –  1 of 3",
        "b            50.00 %       –  1 of 2",
        "none               –       –  0 of 1",
        "diverged           –       –  0 of 1",
    ]
    assert summary.text(0.123456, "test/loss") == "0.1235"
    assert summary.text(123.456, "validation/perplexity") == "123.46"


# --- The terminal -------------------------------------------------------------------------------


def shown(width, height, rows):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system=None)
    with Display("test/error", console) as display:
        display.show({"done": 3, "failed": 1, "waiting": 20}, rows)
        text = file.getvalue()
        display.started("gr=off,seed=0")
        display.started("gr=off,seed=1 and 2 more", "  (log: a)")
        display.ended("gr=off,seed=0", "failed", "[bold]no\x1b[2J", 61.0)
    return text, file.getvalue()[len(text) :]


def test_the_live_table():
    rows = [Row(f"lr.base={i}e-3[red],seed=0", i / 2, 80.0, i / 100, 60 * i) for i in range(40)]
    rows[0] = rows[0]._replace(best=math.nan)
    first, then = shown(100, 12, rows)
    lines = [line.rstrip() for line in first.splitlines()]
    assert any("40 running  3 done  1 failed  20 waiting" in line for line in lines)
    assert any(
        line.split() == ["lr.base=3e-3[red],seed=0", "1.5", "/", "80", "3.00", "%", "3:00"]
        for line in lines
    )
    assert any("lr.base=0e-3[red],seed=0" in line and "–" in line for line in lines)
    assert "lr.base=7e-3" in first and "lr.base=30e-3" not in first  # what fits the screen
    assert "failed   gr=off,seed=0  [bold]no\\x1b[2J  1:01" in then
    assert then.count("started") == 1
    assert "started  gr=off,seed=1 and 2 more  (log: a)" in then


def test_a_long_name_on_a_narrow_terminal():
    first, _ = shown(60, 24, [Row("x" * 100, 1.0, 2.0, 0.5, 1.0)])
    assert first.count("x") == 100 and "50.00 %" in first


def test_durations():
    assert [duration(x) for x in (0.9, 59.9, 61, 3600, 3661)] == [
        *("0:00", "0:59", "1:01", "1:00:00", "1:01:01"),
    ]
