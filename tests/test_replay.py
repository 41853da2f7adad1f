"""Runs that are repeated, and where they first differ."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from etils import epath

from gnp import replay
from gnp.errors import UserError
from gnp.training import train
from tests.training.test_loop import make_config

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("original")
    return workdir, train(make_config(), workdir)


@pytest.fixture
def copy(original, tmp_path):
    """The original in a directory that the test changes."""
    shutil.copytree(original[0], tmp_path / "run")
    return tmp_path / "run"


def repeat(workdir, overrides=(), to="replay"):
    """What the command line does: the verdict and its lines."""
    there, here = epath.Path(workdir), epath.Path(workdir) / to
    config = replay.load_config(there, overrides)
    comparison = replay.begin(there, here)
    try:
        result = train(config, here, on_row=comparison.on_row)
    except replay.Ended:
        result = None
    return comparison.verdict(result)


def read_rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write_rows(workdir, rows):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change(workdir, step, split, **values):
    rows = read_rows(workdir)
    (row,) = [row for row in rows if (row["step"], row["split"]) == (step, split)]
    row |= values
    write_rows(workdir, rows)
    return row


def test_a_run_is_repeated_bit_for_bit(original, copy, capsys):
    _, result = original
    rows = read_rows(copy)
    write_rows(copy, [row | {"wall_time": 9e9, "images_per_second": 1} for row in rows])
    expected = f"identical to {copy}: {len(rows)} rows and the parameters "
    expected += f"(sha256 {result['params_sha256']})"
    assert repeat(copy) == (True, [expected])
    assert "differs" not in capsys.readouterr().err
    # The repetition is a run of its own, and its end is found again without training.
    assert read_rows(copy / "replay") != rows
    assert repeat(copy) == (True, [expected])


def test_the_first_value_that_differs_is_told(original, copy, capsys):
    _, result = original
    true = next(row for row in read_rows(copy) if row["step"] == 15)
    change(copy, 15, "train", loss=0.125)
    change(copy, 25, "train", loss=0.125)
    change(copy, 29, "test", loss=read_rows(copy)[-1]["loss"] * 1.25)
    line = f"step 15, train/loss: 0.125 there, {true['loss']!r} here"
    identical, lines = repeat(copy)
    assert not identical
    assert lines[0] == (
        f"differs from {copy}: first at {line}; largest relative difference of the final test "
        "error and loss 0.2"
    )
    assert lines[1] == f"the parameters are identical (sha256 {result['params_sha256']})"
    told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("differs")]
    assert told == [f"differs from {copy}: {line}"]


@pytest.mark.slow
def test_another_seed_differs_from_the_first_row_on(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"seed": 1}))
    identical, lines = repeat(copy)
    assert not identical
    assert lines[0].startswith(f"differs from {copy}: first at step 5, train/")
    there, here = (json.loads((x / "result.json").read_text()) for x in (copy, copy / "replay"))
    assert lines[1] == (
        f"parameters: sha256 {there['params_sha256']} there, {here['params_sha256']} here"
    )


def test_an_unfinished_run_is_repeated_as_far_as_it_went(copy):
    (copy / "result.json").unlink()
    rows = read_rows(copy)[:4]
    assert rows[-1]["step"] == 15
    write_rows(copy, rows)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "epo')  # killed in the middle of a line
    expected = f"identical to {copy}: 4 rows, up to step 15; it has not ended"
    assert repeat(copy) == (True, [expected])
    assert not (copy / "replay" / "result.json").exists()
    assert max(row["step"] for row in read_rows(copy / "replay")) == 15


def feed(comparison, rows):
    for row in rows:
        comparison.on_row(row)


def compare(copy, rows, result=None):
    """The verdict on rows that come from no training."""
    comparison = replay.Replay(epath.Path(copy), epath.Path(copy / "replay"))
    feed(comparison, rows)
    result = result or json.loads((copy / "result.json").read_text())
    return comparison.verdict(result)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"loss": None}, "train/loss: 1.5 there, None here"),
        ({"loss": 1.5000000000000002}, "train/loss: 1.5 there, 1.5000000000000002 here"),
        ({"new": 1.0}, "train/new: nothing there, 1.0 here"),
        ({"epoch": 2.5}, "train/epoch: 2.0 there, 2.5 here"),
        ({"wall_time": 1.0, "words_per_second": 1.0, "data_wait": 0.5}, None),
    ],
)
def test_what_counts_as_a_difference(copy, values, told):
    row = {"step": 9, "epoch": 2.0, "split": "train", "loss": 1.5, "wall_time": 0.0}
    write_rows(copy, [row])
    identical, lines = compare(copy, [row | values])
    assert identical == (told is None)
    if told is not None:
        assert lines[0] == f"differs from {copy}: first at step 9, {told}"  # and no test rows


def test_rows_that_one_run_alone_has(copy, capsys):
    rows = read_rows(copy)
    at = [(row["step"], row["split"]) for row in rows].index((12, "test"))
    without = rows[:at] + rows[at + 1 :]
    identical, lines = compare(copy, without)
    assert not identical and "first at step 12, test: no row here" in lines[0]
    write_rows(copy, without)
    rows[-1] = rows[-1] | {"loss": 9.0}
    identical, lines = compare(copy, rows)
    assert not identical and "first at step 12, test: no row there" in lines[0]
    assert "step 12, test: no row there" in capsys.readouterr().err


def test_the_parameters_alone_may_differ(copy):
    rows = read_rows(copy)
    other = hashlib.sha256(b"other").hexdigest()
    result = json.loads((copy / "result.json").read_text())
    identical, lines = compare(copy, rows, result | {"params_sha256": other})
    assert not identical
    assert lines[0].startswith(f"differs from {copy}: in the parameters alone; ")
    assert lines[1] == f"parameters: sha256 {result['params_sha256']} there, {other} here"


def test_rows_that_are_made_again_count_once_more(copy):
    """As when a run goes back to a checkpoint: what was dropped does not count."""
    rows = read_rows(copy)
    wrong = [row | {"loss": 0.5} for row in rows[:3]]
    assert compare(copy, wrong + rows)[0]
    assert not compare(copy, rows + wrong)[0]


def test_the_environments_are_compared(copy):
    start = {"step": 0, "packages": {"jax": "0.10.1"}, "devices": "cpu × 8"}
    later = start | {"step": 20, "packages": {"jax": "0.10.2"}}
    commit = later | {"step": 25, "git": {"commit": "abc", "dirty": True}}
    (copy / "environment.json").write_text(json.dumps({"starts": [start, later, commit]}))
    (copy / "replay").mkdir()
    here = {"starts": [later | {"step": 0, "devices": "cpu × 1"}]}
    (copy / "replay" / "environment.json").write_text(json.dumps(here))
    rows = read_rows(copy)
    identical, lines = compare(copy, [row | {"loss": 1.0} for row in rows])
    assert not identical
    assert lines[2:] == [
        "environment: devices cpu × 8 there, cpu × 1 here",
        f"{copy} was continued at step 20 in another environment: jax 0.10.1 before, 0.10.2 after",
    ]
    (copy / "environment.json").unlink()
    _, lines = compare(copy, rows[:1])
    assert lines[2:] == [f"environment: not noted in {copy}"]


def test_a_replay_is_continued_and_other_runs_are_left_alone(copy, tmp_path):
    there, here = epath.Path(copy), epath.Path(tmp_path / "here")
    rows = read_rows(copy)
    replay.begin(there, here)
    write_rows(here, rows[:4])  # interrupted there
    comparison = replay.begin(there, here)
    feed(comparison, rows[4:])
    assert comparison.verdict(json.loads((copy / "result.json").read_text()))[0]

    other = tmp_path / "other"
    shutil.copytree(copy, other)
    for workdir, message in {
        copy: f"--workdir {copy} is the run that --replay would repeat",
        other: f"{other} holds a run that is no replay; choose another --workdir",
    }.items():
        with pytest.raises(UserError) as error:
            replay.begin(there, epath.Path(workdir))
        assert str(error.value) == message
        assert not (workdir / "replay.json").exists()
    with pytest.raises(UserError, match=f"{here} holds a replay of {copy}; choose another"):
        replay.begin(epath.Path(other), here)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "has no rows in metrics.jsonl"),
        (lambda run: (run / "result.json").write_text("{"), "result.json is not valid JSON"),
        (lambda run: (run / "result.json").write_text("{}"), "result.json has no params_sha256"),
        (lambda run: (run / "replay").write_text(""), "cannot write the work directory"),
    ],
)
def test_runs_that_cannot_be_repeated(copy, break_it, message):
    break_it(copy)
    with pytest.raises(UserError, match=message) as error:
        replay.begin(epath.Path(copy), epath.Path(copy) / "replay")
    assert "\n" not in str(error.value)


def test_fields_that_cannot_change_the_results_may_be_set(copy):
    free = [("data.data_dir", "x"), ("data.workers", "3"), ("mesh.fsdp", "2")]
    config = replay.load_config(epath.Path(copy), [*free, ("checkpoint.keep", "9")])
    assert (config.data.data_dir, config.data.workers, config.mesh.fsdp) == ("x", 3, 2)
    assert config.checkpoint.keep == 9 and config.seed == 0
    for field in ("data.batch_size", "seed", "mesh", "data.workers.x"):
        with pytest.raises(UserError, match=f"--config.{field} cannot be set in a replay"):
            replay.load_config(epath.Path(copy), [(field, "1")])


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "gnp.train", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replay=nowhere"], "nowhere is not the work directory of a run: it has no config.json"),
        (["--replay=a", "--config=b.py"], "argument --config: not allowed with argument --replay"),
        (["--workdir=a"], "the following arguments are required: --config"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(flags, message):
    done = command(*flags)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_the_command_line(copy, tmp_path):
    rows = read_rows(copy)
    refused = command(f"--replay={copy}", "--config.seed=1")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    done = command(f"--replay={copy}", "--config.checkpoint.keep=1")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"identical to {copy}: {len(rows)} rows and the parameters (sha256 ")
    assert (copy / "replay" / "report.html").exists()

    change(copy, 10, "train", loss=0.5)
    done = command(f"--replay={copy}", f"--workdir={tmp_path / 'again'}")
    assert done.returncode == 1, done.stderr
    told = f"differs from {copy}: step 10, train/loss: 0.5 there, "
    lines = done.stderr.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith(told)]
    assert any("step 29/29" in line for line in lines[at:]), "told before the end"
    assert f"differs from {copy}: first at step 10, train/loss: 0.5 there, " in done.stdout

    (copy / "result.json").unlink()
    write_rows(copy, rows[:4])
    done = command(f"--replay={copy}", f"--workdir={tmp_path / 'unfinished'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"identical to {copy}: 4 rows, up to step 15")
