"""Runs that are killed, stopped, cut off from power or out of disk, and started again.

The oracle is a run that nothing happens to: every array of the state, every row of the metrics and
every file must be its own in the end.
"""

import itertools
import os
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from gnp import config as gnp_config
from gnp.training.checkpoint import Checkpoints
from gnp.training.experiment import make_experiment
from tests.runs import (
    TINY,
    comparable,
    num_rows,
    rows_of,
    saved_steps,
    saves_under_way,
    train,
    training,
)
from tests.small_disk import small_disk

# Something is saved, evaluated or logged after nearly every call, and the state has all there is.
FLAGS = [
    *(*TINY, "--config.epochs=3", "--config.data.batch_size=50", "--config.log.every=3st"),
    *("--config.eval.every=9st", "--config.checkpoint.every=4st", "--config.steps_per_call=7"),
    *("--config.model.dropout=0.1", "--config.ema.decay=0.9", "--config.checkpoint.best=test/loss"),
]
STEPS = 86  # 3 epochs of 1437 images


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happens to, and the seconds that it took."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train(workdir, *FLAGS).returncode == 0  # fills the compilation cache
    seconds = -time.monotonic()
    again = train(workdir.with_name("again"), *FLAGS)
    seconds += time.monotonic()
    assert again.returncode == 0, again.stderr
    assert_same(workdir.with_name("again"), workdir)
    return workdir, seconds


def finish(workdir, *flags):
    """Starts a run (again), which comes to its end; gives what it says."""
    done = train(workdir, *(flags or FLAGS))
    assert done.returncode == 0, done.stderr
    return done.stderr


def arrays(workdir):
    """Every array of the last checkpoint, as bytes."""
    text = (workdir / "config.json").read_text()
    experiment = make_experiment(gnp_config.from_json(text, where="config.json"))
    state = Checkpoints(workdir).restore(experiment.abstract_state)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}


def assert_same(workdir, whole, *, but=()):
    """All that two runs leave is the same, but for times and the files named."""
    assert comparable(workdir) == comparable(whole)
    assert saved_steps(workdir)[-1] == saved_steps(whole)[-1]
    assert len(saved_steps(workdir)) <= 3  # the newest two and the best
    assert saves_under_way(workdir) == []
    found, expected = arrays(workdir), arrays(whole)
    assert any("opt_state" in name for name in expected)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    names, others = (
        {path.name for path in folder.iterdir() if not path.name.startswith("events.")}
        for folder in (workdir, whole)
    )
    assert names == others | set(but)


@pytest.mark.parametrize(
    "kills",
    [pytest.param(10, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.soak)],
)
def test_killed_at_random_moments(whole, tmp_path, kills):
    """`kill -9` anywhere from the first import to the last file, as often as it takes."""
    whole, seconds = whole
    moments = random.Random(kills)
    workdirs = (tmp_path / f"run{i}" for i in itertools.count())
    workdir, told = next(workdirs), []
    while len(told) < kills:
        moment = moments.uniform(0, seconds)
        with training(workdir, *FLAGS) as running:
            try:
                code = running.process.wait(moment)
            except subprocess.TimeoutExpired:
                code = None
        if code is None:
            told.append(f"{workdir.name} at {moment:.3f} s, {num_rows(workdir)} rows")
            continue
        assert code == 0, (told, running.stderr)
        print(told)
        assert_same(workdir, whole)
        workdir = next(workdirs)
    print(told)  # shown when what follows fails
    finish(workdir)
    assert_same(workdir, whole)


@pytest.mark.parametrize(
    "seed", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.soak)]
)
def test_a_power_cut_after_a_checkpoint(whole, tmp_path, seed):
    """Files that were not yet on the disk are then empty, cut or zero; the metrics' end too."""
    whole, _ = whole
    workdir, chance = tmp_path / "run", random.Random(seed)
    with training(workdir, *FLAGS) as running:
        running.wait_until(lambda: len(saved_steps(workdir)) >= 2, "two checkpoints")
        running.wait_for_a_save()
        time.sleep(chance.uniform(0, 0.1))
    *others, newest = saved_steps(workdir)
    damage(workdir / "checkpoints" / str(newest), chance)
    with open(workdir / "metrics.jsonl", "ab") as file:
        file.write(bytes(300))
    said = finish(workdir)
    assert f"{workdir / 'checkpoints' / str(newest)} is damaged" in said
    assert any(f"continues at step {step} of {STEPS}" in said for step in others)
    assert_same(workdir, whole, but=["damaged"])


def damage(checkpoint, chance):
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        size = path.stat().st_size
        left = chance.choice([size, 0, size // 2, size // 2])
        if path.name == "manifest.ocdbt":  # what tells where the arrays are, in any case
            left = chance.choice([0, size // 2])
        os.truncate(path, left)
        if chance.random() < 0.5:
            os.truncate(path, size)  # zeros in place of what is lost


def in_training(running):
    running.wait_for_rows(num_rows(running.workdir) + 3)


def in_a_save(running):
    running.wait_until(lambda: "continues at step" in running.stderr, "training")
    running.wait_for_a_save()


def at_the_end(running):
    rows = running.workdir / "metrics.jsonl"
    running.wait_until(lambda: f'"step": {STEPS},' in rows.read_text(), "the last step")


@pytest.mark.slow
def test_asked_to_stop(whole, tmp_path):
    whole, _ = whole
    workdir = tmp_path / "run"
    for number, code, moment in [
        (signal.SIGTERM, os.EX_TEMPFAIL, in_training),
        (signal.SIGTERM, os.EX_TEMPFAIL, in_a_save),
        (signal.SIGINT, 130, in_training),
        (signal.SIGINT, 130, in_a_save),
    ]:
        with training(workdir, *FLAGS) as running:
            moment(running)
            running.signal(number)
            assert running.wait() == code, running.stderr
        *_, newest = saved_steps(workdir)
        assert f"stopped at step {newest} of {STEPS}, and saved. To continue it:" in running.stderr
        assert str(workdir) in running.stderr.splitlines()[-1]
        assert "Traceback" not in running.stderr
        assert not (workdir / "result.json").exists()
    finish(workdir)
    assert_same(workdir, whole)


@pytest.mark.slow
def test_asked_twice_to_stop(whole, tmp_path):
    """The second signal may come at any moment of what the first one asked for."""
    whole, _ = whole
    workdir, chance = tmp_path / "run", random.Random(0)
    for number, codes, moment in [
        (signal.SIGINT, [130], in_training),
        (signal.SIGINT, [130], in_a_save),
        (signal.SIGTERM, [os.EX_TEMPFAIL], in_a_save),
        (signal.SIGINT, [0, 130], at_the_end),  # 0: there was no time for the second one
    ]:
        with training(workdir, *FLAGS) as running:
            moment(running)
            running.signal(number)
            running.wait_for_line("again to stop at once")
            time.sleep(chance.uniform(0, 0.05))
            running.signal(number)
            assert running.wait() in codes, running.stderr
        assert "Traceback" not in running.stderr
    finish(workdir)
    assert_same(workdir, whole)


@pytest.mark.slow
def test_sigterm_during_a_long_compilation(tmp_path):
    flags = ["--config.model.depth=60", "--config.model.num_heads=2", "--config.model.width=12"]
    # Nothing is compiled yet, and all is to be optimised: a minute.
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    with training(tmp_path / "run", *flags, env=env) as running:
        running.wait_for_line("memory")  # told just before
        time.sleep(4)
        assert "ready in" not in running.stderr
        running.signal(signal.SIGTERM)
        assert running.process.wait(20) == os.EX_TEMPFAIL
        assert "start the same command again" in running.stderr.splitlines()[-1]


@pytest.mark.slow
def test_stopped_during_an_evaluation(tmp_path):
    draw = np.random.default_rng(0)
    splits = {
        f"{split}_{name}": values
        for split, count in (("train", 600), ("test", 20_000))
        for name, values in (
            ("images", draw.integers(0, 256, (count, 8, 8), np.uint8)),
            ("labels", draw.integers(0, 10, count)),
        )
    }
    np.savez(tmp_path / "data.npz", **splits)
    flags = [
        *(*TINY, "--config.data.name=npz", f"--config.data.data_dir={tmp_path / 'data.npz'}"),
        *("--config.epochs=2", "--config.eval.every=50%", "--config.eval.batch_size=1"),
    ]
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    finish(whole, *flags)
    for number, code in [(signal.SIGTERM, os.EX_TEMPFAIL), (signal.SIGINT, 130)]:
        before = num_rows(workdir)
        with training(workdir, *flags) as running:
            # The last row before it, or a start in the midst of it.
            running.wait_for_line("step 5/12" if not before else "continues at step 6")
            running.wait_until(lambda: has_row(workdir, "train", 5), "the row of training")
            time.sleep(0.3)
            running.signal(number)
            assert running.wait() == code, running.stderr
        assert "stopped at step 6 of 12, and saved" in running.stderr
        assert not has_row(workdir, "test", 6)
    finish(workdir, *flags)
    assert_same(workdir, whole)


def has_row(workdir, split, step):
    return any((row["split"], row["step"]) == (split, step) for row in rows_of(workdir))


@pytest.mark.slow
def test_saved_by_the_clock(whole, tmp_path):
    whole, _ = whole
    workdir, flags = tmp_path / "run", [*FLAGS, "--config.checkpoint.every=0.01min"]
    with training(workdir, *flags) as running:
        running.wait_until(lambda: len(saved_steps(workdir)) >= 2, "two checkpoints")
        running.wait_for_rows(num_rows(workdir) + 2)
    assert max(saved_steps(workdir)) < STEPS
    assert "continues at step" in finish(workdir, *flags)
    assert comparable(workdir) == comparable(whole)
    assert arrays(workdir) == arrays(whole)


# --- Disks --------------------------------------------------------------------------------------


def fill(running, disk):
    """Fills the disk at an instant between two checkpoints or in one."""
    running.wait_until(lambda: len(saved_steps(running.workdir)) >= 2, "two checkpoints")
    running.signal(signal.SIGSTOP)
    disk.fill()
    running.signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(whole, tmp_path):
    whole, _ = whole
    with small_disk(kib=8192) as disk:
        workdir = disk.path / "run"
        with training(workdir, *FLAGS, disk=disk) as running:
            fill(running, disk)
            running.wait_for_line("could not save")
            disk.free()
            assert running.wait() == 0, running.stderr
            assert "Traceback" not in running.stderr
        shutil.copytree(workdir, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


@pytest.mark.soak
def test_a_disk_that_stays_full(whole, tmp_path):
    whole, _ = whole
    with small_disk(kib=8192) as disk:
        workdir = disk.path / "run"
        with training(workdir, *FLAGS, disk=disk) as running:
            fill(running, disk)
            assert running.wait() == 2
        line = running.stderr.splitlines()[-1]
        ended = f"error: the training has come to its end, step {STEPS}, but"
        assert line.startswith(ended), running.stderr
        assert "No space left on device" in line
        assert "Traceback" not in running.stderr
        assert saves_under_way(workdir) == []
        *_, newest = saved_steps(workdir)
        with training(workdir, *FLAGS, disk=disk) as running:
            assert "No space left on device" in refused(running)
        disk.free()
        with training(workdir, *FLAGS, disk=disk) as running:
            running.wait_until(lambda: saved_steps(workdir)[-1] > newest, "a checkpoint")
            running.signal(signal.SIGSTOP)
            disk.fill()
            running.signal(signal.SIGTERM)
            running.signal(signal.SIGCONT)
            assert running.wait() == os.EX_TEMPFAIL
        assert f"continues at step {newest} of" in running.stderr
        *_, newest = saved_steps(workdir)
        assert f"but what is saved is step {newest}. To continue it:" in running.stderr
        assert "Traceback" not in running.stderr
        disk.free()
        with training(workdir, *FLAGS, disk=disk) as running:
            assert running.wait() == 0, running.stderr
        shutil.copytree(workdir, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


# --- Places where nothing can be trained ---------------------------------------------------------


def refused(running):
    """Its one line, with exit code 2."""
    assert running.wait() == 2, running.stderr
    (line,) = running.stderr.replace("preparing digits, compiling …\n", "").splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    with training(tmp_path / "file", *TINY) as running:
        assert f"cannot write the work directory {tmp_path / 'file'}" in refused(running)
    with training(tmp_path / "file" / "run", *TINY) as running:
        assert f"cannot write the work directory {tmp_path / 'file' / 'run'}" in refused(running)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("mine")
    with training(tmp_path / "run", *TINY) as running:
        assert f"{tmp_path / 'run' / 'checkpoints'}" in refused(running)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "run" / "checkpoints").read_text() == "mine"


@pytest.mark.slow
def test_a_disk_that_is_read_only(tmp_path):
    with small_disk(kib=8192) as disk:
        (disk.path / "old").mkdir()
        disk.run(["mount", "-o", "remount,ro", disk.inside])
        for name in ("old", "new"):
            with training(disk.path / name, *TINY, disk=disk) as running:
                assert f"{disk.inside}/{name}" in refused(running)


@pytest.mark.slow
def test_two_at_the_same_instant(whole, tmp_path):
    whole, _ = whole
    workdir = tmp_path / "deep" / "in" / "run"  # both make its parents too
    with training(workdir, *FLAGS) as one, training(workdir, *FLAGS) as other:
        codes = one.wait(), other.wait()
    assert sorted(codes) == [0, 2], (one.stderr, other.stderr)
    assert f"training in {workdir} since" in refused(one if codes[0] else other)
    assert_same(workdir, whole)
