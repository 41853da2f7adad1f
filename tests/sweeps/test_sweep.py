"""Sweeps from the flags to the table: what is trained, what is not trained again, what fails."""

import contextlib
import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time

import optuna
import pytest

from gnp.errors import UserError
from gnp.sweeps import progress
from tests.runs import TINY
from tests.sweeps.conftest import ROOT

PYTHON = sys.executable

# The oracle of the stand-in's error: |log10(lr.base) + 3| / 10 + seed / 1000.
RATES = ["--grid", "lr.base=1e-1,1e-3,1e-2"]


def test_a_grid_its_table_and_its_directory(run, capsys):
    assert run(*RATES, "--seeds=2", "--config.epochs=2") == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[:4] == [
        "setting        test/error     std  seeds",
        "lr.base=0.001      0.05 %  0.07 %  2",  # of 0 and 0.1 %: their mean, and 0.1 / √2
        "lr.base=0.01      10.05 %  0.07 %  2",
        "lr.base=0.1       20.05 %  0.07 %  2",
    ]
    assert "6 done" in output.out and f"python -m gnp.report {run.out}" in output.out
    assert output.err.startswith("6 trials, judged by test/error\nstarted  lr.base=0.1,seed=0\n")
    assert "done     lr.base=0.1,seed=1  test/error 20.10 %" in output.err
    names = [f"lr.base={rate},seed={seed}" for rate in ("0.1", "0.001", "0.01") for seed in (0, 1)]
    logs = [path.name for path in (run.out / "logs").iterdir()]
    assert run.trials == sorted(names) and sorted(logs) == sorted(f"{x}.log" for x in names)
    config = json.loads((run.out / "trials" / names[5] / "config.json").read_text())
    assert (config["lr"]["base"], config["seed"], config["epochs"]) == (0.01, 1, 2.0)
    asked = run.asked
    assert asked.pop("configuration")["epochs"] == 2.0
    assert asked == {
        "format": 1,
        "kind": "grid",
        "config": "configs/digits.py",
        "overrides": {"epochs": "2"},
        "parameters": {"lr.base": ["0.1", "0.001", "0.01"]},
        "seeds": [0, 1],
        "metric": "test/error",
    }


def test_a_sweep_goes_from_nothing_to_its_report(run, capsys):
    flags = ["--grid=gr=off,zero;lr.base=1e-2,1e-3", "--seeds=3", "--config.epochs=2"]
    assert run(*flags, "--report") == 0
    assert f"report: {run.out / 'report' / 'index.html'}\n" in capsys.readouterr().out
    rows = (run.out / "report" / "tables" / "comparison.csv").read_text().splitlines()
    means = {}
    for row in csv.DictReader(rows):
        means[row["setting"]] = float(row["test error (%)"]), int(row["test error (%), seeds"])
    expected = {"lr 0.001": 0.1, "lr 0.01": 10.1}  # of seeds 0, 1 and 2, in percent
    assert means == {
        f"gr {policy}, {rate}": (pytest.approx(mean), 3)
        for policy in ("off", "zero")
        for rate, mean in expected.items()
    }
    page = (run.out / "report" / "index.html").read_text()
    assert "12 of 12 finished" in page and "<svg" in page
    assert (run.out / "report" / "figures" / "error_by_policy.png").exists()


def test_what_is_done_is_not_done_again_and_a_grid_may_grow(run, capsys):
    assert run("--grid", "lr.base=1e-3", "--config.epochs=1") == 0
    assert run("--grid", "lr.base=0.001", "--config.epochs=1") == 0
    assert run("--grid", "lr.base=1e-3,1e-2", "--seeds=2", "--config.epochs=1") == 0
    assert run("--grid", "lr.base=1e-3", "--seeds=0,", "--config.epochs=1") == 0
    assert len(run.trials) == 4
    assert all(len(run.starts(name)) == 1 for name in run.trials)
    assert run.asked["parameters"] == {"lr.base": ["0.001", "0.01"]}
    assert run.asked["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("flags", "config", "message"),
    [
        (["--config.epochs=2"], "configs/digits.py", "config.epochs: 1.0 there, 2.0 here"),
        ([], "configs/digits.py", "config.epochs: 1.0 there, 80.0 here"),
        (
            ["--config.epochs=1"],
            "configs/digits.py:optimizer=sgd",
            "config.lr.base: 0.002 there, 0.05 here; "
            "config.optimizer.name: 'adam' there, 'sgd' here",
        ),
        (
            ["--config.epochs=1", "--grid", "gr=off"],
            "configs/digits.py",
            "parameters: lr.base there, lr.base, gr here",
        ),
    ],
)
def test_another_sweep_is_refused(run, flags, config, message):
    run("--grid", "lr.base=1e-3", "--config.epochs=1")
    with pytest.raises(UserError) as error:
        run("--grid", "lr.base=1e-3", *flags, config=config)
    assert f"{run.out} holds another sweep ({message}); choose another --out" in str(error.value)


def test_a_config_file_that_has_changed_is_refused(run, tmp_path):
    text = (ROOT / "configs/digits.py").read_text()
    file = tmp_path / "recipe.py"
    file.write_text(text)
    flags = ["--grid", "gr=off", "--config.epochs=1"]
    assert run(*flags, config=file) == 0
    file.write_text(text.replace("gr.radius = 0.05", "gr.radius = 0.07"))
    with pytest.raises(UserError, match=r"another sweep \(config.gr.radius: 0.05 there, 0.07 here"):
        run(*flags, config=file)
    # Only with this value of the argument, which the file without it does not tell.
    in_part = "gr.radius = 0.07 if arguments.gr == 'off' else 0.05"
    file.write_text(text.replace("gr.radius = 0.05", in_part))
    with pytest.raises(UserError, match=r"begun with another .*config.gr.radius: 0.05 there, 0.07"):
        run(*flags, config=file)


def test_a_config_file_by_another_name_is_the_same_sweep(run, tmp_path, monkeypatch):
    flags = ["--grid", "gr=off", "--config.epochs=1"]
    for config in ("configs/digits.py", "./configs/digits.py", ROOT / "configs/digits.py"):
        assert run(*flags, config=config) == 0
    (tmp_path / "elsewhere.py").write_text((ROOT / "configs/digits.py").read_text())
    monkeypatch.chdir(tmp_path)
    assert run(*flags, config="elsewhere.py") == 0
    assert len(run.starts("gr=off,seed=0")) == 1


def test_a_sweep_goes_on_with_what_a_run_may_go_on_with(run):
    """As a failed trial's advice says: --config.on_nonfinite=skip."""
    flags = ["--grid", "gr=lambda,zero", "--config.epochs=1"]
    assert run(*flags) == 1
    assert run(*flags, "--config.on_nonfinite=skip", "--config.checkpoint.keep=2") == 1
    assert len(run.starts("gr=zero,seed=0")) == 1
    path = run.out / "trials" / "gr=lambda,seed=0" / "config.json"
    assert json.loads(path.read_text())["on_nonfinite"] == "skip"
    assert run.asked["overrides"]["on_nonfinite"] == "skip"


def test_a_sweep_of_an_older_version_goes_on(run):
    flags = ["--grid", "lr.base=1e-3", "--config.epochs=1"]
    assert run(*flags) == 0
    asked = run.asked
    del asked["configuration"]
    (run.out / "sweep.json").write_text(json.dumps(asked))
    assert run(*flags) == 0 and run.asked["configuration"]["epochs"] == 1.0
    assert len(run.starts("lr.base=0.001,seed=0")) == 1


def test_a_failed_trial_says_why_stops_nothing_and_is_tried_again(run, capsys):
    flags = ["--grid", "gr=lambda,r,zero", "--config.epochs=1"]
    assert run(*flags) == 1
    output = capsys.readouterr()
    log = run.out / "logs" / "gr=lambda,seed=0.log"
    assert f"failed   gr=lambda,seed=0  the disk is full (see {log})" in output.err
    assert "failed   gr=r,seed=0  ArithmeticError: first (see" in output.err
    assert "done     gr=zero,seed=0" in output.err
    assert "failed: gr=lambda,seed=0; gr=r,seed=0" in output.out
    assert "1 done, 2 failed" in output.out
    assert log.read_text().startswith(f"$ {sys.executable} -m gnp.train --config=configs/digits.py")
    assert run(*flags) == 1
    assert len(run.starts("gr=lambda,seed=0")) == 2
    assert len(run.starts("gr=zero,seed=0")) == 1


def test_a_trial_that_is_killed_says_so(run, capsys, monkeypatch, tmp_path):
    python = tmp_path / "killed"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert run("--grid", "gr=off", "--config.epochs=1") == 1
    assert "failed   gr=off,seed=0  ended by SIGKILL (see" in capsys.readouterr().err


def test_nothing_is_written_when_anything_is_wrong(run):
    for flags in (
        ["--grid", "lr.base=1e-3,-1"],
        ["--seeds=2", "--metric=validation/error"],
        ["--seeds=2", "--jobs=3", "--devices=0,1"],
        ["--seeds=2", "--launcher=slurm", "--sbatch=-p gpu"],
        ["--search", "lr.base=uniform(-1,1)"],
    ):
        with pytest.raises(UserError):
            run(*flags)
        assert not run.out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing varies; give --grid, --search or --seeds"),
        (["--grid=gr=off", "--search=lr.base=uniform(1,2)"], "--search and --grid do not go toget"),
        (["--seeds=2", "--trials=3"], "--trials is for a --search"),
        (["--seeds=2", "--jobs=0"], "--jobs=0; it must be 1 or more"),
        (["--seeds=2", "--sbatch=--partition=gpu"], "--sbatch is for --launcher=slurm"),
        (["--seeds=2", "--vmap", "--launcher=slurm"], "--vmap and --launcher=slurm do not go toge"),
        (["--seed=2"], "unknown flag '--seed'; did you mean '--seeds'?"),
        (["--seeds=2", "--sampler=x"], "invalid choice: 'x'"),
    ],
)
def test_flags_that_do_not_go_together(run, flags, message):
    with pytest.raises(UserError) as error:
        run(*flags)
    assert message in str(error.value)


def test_a_directory_that_is_something_else(run, tmp_path):
    run.out.mkdir()
    (run.out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is the work directory of a run; choose another --out"):
        run("--seeds=1")
    (run.out / "config.json").unlink()
    for text in ("", "[]", "{}", '{"format": 2}', '{"format": 1, "seeds": ["a"]}', "[" * 100_000):
        (run.out / "sweep.json").write_text(text)
        with pytest.raises(UserError, match=r"sweep\.json"):
            run("--seeds=1")
    run.out = tmp_path / "python"  # a file
    with pytest.raises(UserError, match="cannot write"):
        run("--seeds=1")


def test_two_sweeps_at_once_are_refused(run):
    from gnp.files import lock

    run.out.mkdir()
    message = rf"process {os.getpid()} on .*{run.out} .*or choose another --out$"
    with lock(run.out), pytest.raises(UserError, match=message):
        run("--seeds=1")


@contextlib.contextmanager
def another(workdir, environment):
    """A process that trains there until it is told its result, or nothing."""
    code = (
        "import pathlib, sys; from gnp.files import lock\n"
        "with lock(pathlib.Path(sys.argv[1])):\n"
        "    print(flush=True); text = sys.stdin.read()\n"
        "    if text: pathlib.Path(sys.argv[1], 'result.json').write_text(text)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [PYTHON, "-c", code, str(workdir)]
    with subprocess.Popen(command, env={**os.environ, **environment}, **pipes) as process:
        process.stdout.readline()
        yield process


@pytest.mark.parametrize("ends", [True, False])
def test_beside_what_a_killed_sweep_has_left_running_the_others_are_trained(run, capsys, ends):
    """On the other device; what it has not ended is continued on its own."""
    flags = ["--config.epochs=1", "--jobs=2", "--devices=4,5"]
    names = [f"lr.base={rate},seed=0" for rate in ("0.1", "0.01", "0.001")]
    assert run("--grid", "lr.base=1e-3", *flags) == 0
    workdir = run.out / "trials" / names[2]
    result = (workdir / "result.json").read_text()
    (workdir / "result.json").unlink()
    with another(workdir, {"CUDA_VISIBLE_DEVICES": "5"}) as process:

        def end():
            try:
                wait_for(run.out / "trials" / names[1] / "result.json")
            finally:
                process.communicate(result if ends else "")

        thread = threading.Thread(target=end)
        thread.start()
        capsys.readouterr()
        assert run("--grid", "lr.base=1e-1,1e-2,1e-3", *flags) == 0
        thread.join()
    output = capsys.readouterr()
    assert f"started  {names[2]}  (by another process" in output.err and "3 done" in output.out
    assert [run.starts(name)[0]["devices"] for name in names[:2]] == ["4", "4"]
    assert [x["devices"] for x in run.starts(names[2])][1:] == ([] if ends else ["5"])


@pytest.mark.parametrize("flags", [["--vmap"], ["--jobs=2", "--devices=4,5"]])
def test_what_a_killed_sweep_has_left_running_elsewhere_is_waited_for(run, capsys, flags):
    """It is in no slot of this sweep, or in one program with others; it is not trained again."""
    flags = ["--config.epochs=1", *flags]
    assert run("--grid", "lr.base=1e-3", *flags) == 0
    workdir = run.out / "trials" / "lr.base=0.001,seed=0"
    result = (workdir / "result.json").read_text()
    (workdir / "result.json").unlink()
    with another(workdir, {"CUDA_VISIBLE_DEVICES": "6"}) as process:
        timer = threading.Timer(1.0, process.communicate, [result])
        timer.start()
        capsys.readouterr()
        assert run("--grid", "lr.base=1e-3,1e-2", *flags) == 0
        timer.join()
    error = capsys.readouterr().err
    assert error.startswith("other processes train lr.base=0.001,seed=0; waiting for their end\n")
    assert "started  lr.base=0.01,seed=0" in error and len(run.starts(workdir.name)) == 1


def test_with_one_slot_what_was_left_running_has_it(run, capsys):
    assert run("--grid", "lr.base=1e-3", "--config.epochs=1") == 0
    workdir = run.out / "trials" / "lr.base=0.001,seed=0"
    result = (workdir / "result.json").read_text()
    (workdir / "result.json").unlink()
    with another(workdir, {}) as process:
        timer = threading.Timer(1.0, process.communicate, [result])
        timer.start()
        capsys.readouterr()
        assert run("--grid", "lr.base=1e-2,1e-3", "--config.epochs=1") == 0
        timer.join()
    events = [line.split()[:2] for line in capsys.readouterr().err.splitlines()[1:]]
    assert events == [
        *(["started", "lr.base=0.001,seed=0"], ["done", "lr.base=0.001,seed=0"]),
        *(["started", "lr.base=0.01,seed=0"], ["done", "lr.base=0.01,seed=0"]),
    ]
    assert len(run.starts(workdir.name)) == 1


@pytest.mark.slow
def test_what_waits_for_another_process_ends_with_its_sweep(run):
    """Or it would begin the trial beside that of the next sweep."""
    workdir = run.out / "trials" / "a"
    workdir.mkdir(parents=True)
    command = [PYTHON, "-m", "gnp.sweeps.after", str(workdir), "/no/program"]
    code = f"import subprocess; p = subprocess.Popen({command}); print(flush=True); p.wait()"
    with another(workdir, {}) as process:
        with subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE) as sweep:
            sweep.stdout.readline()
            time.sleep(2)
            sweep.kill()
            sweep.communicate(timeout=60)  # to the end of all who could write there
        process.communicate("")


def test_side_by_side_each_has_cores_of_its_own(run, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    monkeypatch.setenv("STAND_IN_SECONDS", "0.5")
    assert run("--seeds=2", "--jobs=2", "--config.epochs=1") == 0
    a, b = (run.starts(f"seed={seed}")[0]["cores"] for seed in (0, 1))
    assert a and b and sorted(a + b) == cores


def test_side_by_side_each_has_devices_of_its_own(run, monkeypatch):
    monkeypatch.setenv("STAND_IN_SECONDS", "0.5")
    assert run("--seeds=4", "--jobs=2", "--devices=4,5,6", "--config.epochs=1") == 0
    devices = [run.starts(f"seed={seed}")[0]["devices"] for seed in range(4)]
    assert {*devices} == {"4", "5,6"} and devices[0] != devices[1]


def test_trials_that_are_trained_together(run, capsys):
    """In three processes, one a policy; one trial fails alone, and in the end all of a group."""
    flags = ["--grid", "gr=off,zero,lambda;lr.base=1e-3,1e-2,2", "--config.epochs=1", "--vmap"]
    assert run(*flags) == 1
    output = capsys.readouterr()
    assert "9 to train in 3 programs" in output.err
    log = run.out / "logs" / "gr=off,lr.base=0.001,seed=0.log"
    first = f"started  gr=off,lr.base=0.001,seed=0 and 2 more in one program  (log: {log})\n"
    assert first in output.err and log.exists()
    for gr in ("off", "zero"):
        assert f"done     gr={gr},lr.base=0.001,seed=0  test/error 0.00 %" in output.err
        assert f"done     gr={gr},lr.base=0.01,seed=0  test/error 10.00 %" in output.err
        assert f"failed   gr={gr},lr.base=2.0,seed=0  a loss is not finite" in output.err
    assert output.err.count("the disk is full (see") == 3
    assert "4 done, 5 failed" in output.out
    assert run(*flags) == 1  # of "off" and "zero" one trial is left, which is trained alone
    assert "5 to train in 3 programs" in capsys.readouterr().err
    assert len(run.starts("gr=off,lr.base=2.0,seed=0")) == 1


def test_a_group_of_weights_and_biases(run):
    """Its trials are a group there, unless the user names one."""
    run("--grid", "gr=off", "--config.epochs=1", "--config.log.wandb=project")
    run.out = run.out.with_name("other")
    run("--grid", "gr=off", "--config.epochs=1", "--config.log.wandb=p", "--config.log.group=mine")
    groups = {}
    for out in ("sweep", "other"):
        path = run.out.with_name(out) / "trials" / "gr=off,seed=0" / "config.json"
        groups[out] = json.loads(path.read_text())["log"]["group"]
    assert groups == {"sweep": "sweep", "other": "mine"}


# --- Stopping -----------------------------------------------------------------------------------


@contextlib.contextmanager
def start(run, *flags):
    """A sweep of stand-ins in a process of its own."""
    code = (
        "import runpy, sys; "
        f"sys.executable = {sys.executable!r}; runpy.run_module('gnp.sweep', run_name='__main__')"
    )
    process = subprocess.Popen(
        [PYTHON, "-c", code, "--config=configs/digits.py", f"--out={run.out}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow)],
)
def test_a_signal_lets_the_trials_save(run, number, code):
    flags = ["--grid", "gr=none,zero", "--seeds=1", "--config.epochs=1"]
    with start(run, *flags) as process:
        wait_for(run.out / "trials" / "gr=none,seed=0" / "metrics.jsonl")
        os.killpg(process.pid, number)  # as a terminal does
        output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "stopped  gr=none,seed=0  to be continued" in errors
    assert "stopped; to go on:\n" in errors and f"--out={run.out}" in errors
    assert output == "2 waiting\n"
    assert (run.out / "logs" / "gr=none,seed=0.log").read_text().endswith("saved\n")
    assert run.trials == ["gr=none,seed=0"]


@pytest.mark.slow
def test_the_second_ctrl_c_ends_at_once(run, monkeypatch):
    monkeypatch.setenv("STAND_IN_STUBBORN", "1")
    with start(run, "--grid", "gr=none", "--config.epochs=1") as process:
        wait_for(run.out / "trials" / "gr=none,seed=0" / "metrics.jsonl")
        os.killpg(process.pid, signal.SIGINT)
        while "again to stop at once" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.5)
        assert process.poll() is None  # it waits for the trial, which does not end
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    (trial,) = run.starts("gr=none,seed=0")
    with pytest.raises(ProcessLookupError):
        os.kill(trial["process"], 0)


def test_a_trial_whose_log_cannot_be_written_stops_nothing(run, capsys):
    (run.out / "logs" / "gr=off,seed=0.log").mkdir(parents=True)
    assert run("--grid", "gr=off,zero", "--config.epochs=1") == 1
    printed = capsys.readouterr()
    assert "1 done, 1 failed" in printed.out
    assert "cannot start gr=off,seed=0: " in printed.out + printed.err


# --- Progress -----------------------------------------------------------------------------------


def test_progress_of_a_run_that_is_being_written(tmp_path):
    watch = progress.Watch("test/error")
    assert watch.look(tmp_path) == progress.Progress()
    (tmp_path / "config.json").write_text("{}")
    rows = tmp_path / "metrics.jsonl"
    for text, epoch, values in [
        ("", 0.0, ()),
        ('{"split": "train", "step": 4, "epoch": 0.5, "error": 0.9}\n', 0.5, ()),
        ('{"split": "test", "step": 8, "epoch": 1, "error": 0.25}\n', 1.0, (0.25,)),
        ('{"split": "test", "step": 16, "epoch": 2, "error": 0.5}\n{"sp', 2.0, (0.25, 0.5)),
    ]:
        with open(rows, "a") as file:
            file.write(text)
        seen = watch.look(tmp_path)
        assert (seen.epoch, seen.values) == (epoch, values)
    assert seen.best == 0.25


# --- The real thing -----------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_settings_are_stopped_and_the_others_are_not(run, monkeypatch):
    """Errors fall evenly from 1, so that after any epoch the order is that of the last ones."""
    monkeypatch.setenv("STAND_IN_SECONDS", "0.5")
    flags = ["--sampler=random", "--trials=9", "--prune=median", "--config.epochs=6", "--jobs=2"]
    assert run("--search", "lr.base=loguniform(1e-3,1e3)", *flags) == 0
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(run.out / "optuna.journal"))
    )
    trials = optuna.load_study(study_name="sweep", storage=storage).trials
    states = [trial.state.name for trial in trials]
    assert len(trials) == 9 and {*states} == {"COMPLETE", "PRUNED"}
    last = [abs(math.log10(trial.params["lr.base"]) + 3) / 10 for trial in trials]
    for i, (state, name) in enumerate(zip(states, run.trials, strict=True)):
        log = (run.out / "logs" / f"{name}.log").read_text()
        assert log.endswith("saved\n") == (state == "PRUNED")
        if state == "PRUNED":  # those before it, and the one beside it, may have been complete
            before = [x for x, y in zip(last[: i + 2], states, strict=False) if y == "COMPLETE"]
            assert last[i] > statistics.median(before[:5]) or last[i] > statistics.median(before)


@pytest.mark.slow
def test_real_trials_in_one_program(tmp_path):
    """One of them diverges, which the other two do not notice."""
    flags = ["--config=configs/digits.py:gr=off,optimizer=sgd", *TINY, "--config.epochs=1"]
    grid = ["--grid=lr.base=0.05,0.01,1e30", "--vmap", f"--out={tmp_path}"]
    command = [PYTHON, "-m", "gnp.sweep", *flags, *grid]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "3 to train in 1 programs" in done.stderr
    assert "2 done, 1 failed" in done.stdout
    assert "failed   lr.base=1e+30,seed=0  " in done.stderr and "not finite" in done.stderr
    for rate in ("0.05", "0.01"):
        assert (tmp_path / "trials" / f"lr.base={rate},seed=0" / "report.html").exists()


@pytest.mark.slow
def test_real_trials_end_as_they_do_alone(tmp_path):
    """Two trials by gnp.sweep, and one of them by gnp.train."""
    flags = ["--config=configs/digits.py", *TINY, "--config.epochs=1"]
    command = [
        PYTHON,
        "-m",
        "gnp.sweep",
        *flags,
        "--grid=gr=off,zero",
        f"--out={tmp_path / 'sweep'}",
        "--report",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 done" in done.stdout
    alone = [PYTHON, "-m", "gnp.train", "--config=configs/digits.py:gr=zero", *flags[1:]]
    subprocess.run([*alone, f"--workdir={tmp_path / 'alone'}"], cwd=ROOT, check=True, timeout=300)
    results = [
        json.loads((path / "result.json").read_text())["params_sha256"]
        for path in (tmp_path / "sweep/trials/gr=zero,seed=0", tmp_path / "alone")
    ]
    assert results[0] == results[1]
    assert (tmp_path / "sweep/trials/gr=off,seed=0/report.html").exists()
    for name in ("index.html", "interactive.html", "figures/gradient_norm_by_policy.png"):
        assert (tmp_path / "sweep/report" / name).exists()
