"""The record's runs are those of `gnp.training.train`, in one program, interrupted or not."""

import importlib.util
import json
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp import transforms
from gnp.errors import UserError
from gnp.training import train
from gnp.training.checkpoint import Checkpoints
from gnp.training.experiment import make_experiment
from tests.data.cifar_like import write_cifar

ROOT = pathlib.Path(__file__).parents[1]
PATH = ROOT / "scripts" / "cifar_record.py"
# 80 images in batches of 16, 15 steps, of which 5 warm up; a ViT of one block on 4 patches. A key's
# bias has no gradient but rounding errors, which Adam magnifies unless its epsilon is large.
TINY = [
    *("--epochs=3", "--config.lr.warmup=1ep", "--config.data.batch_size=16"),
    *("--config.model.patch_size=16", "--config.model.width=16", "--config.model.depth=1"),
    *("--config.model.num_heads=2", "--config.optimizer.eps=1e-3"),
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cifar_record", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cifar_record"] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    write_cifar(data_dir, 80, 30)
    return ["--out=unused", f"--data_dir={data_dir}", *TINY]


@pytest.fixture(scope="module")
def experiment(script, flags):
    return make_experiment(script.parse(flags)[1])


@pytest.fixture(scope="module")
def program(script, experiment):
    return script.Program(experiment)


def never():
    return False


def after_a_call():
    """Stops after the first call: it is asked before a group, and after each of its calls."""
    answers = iter([False])
    return lambda: next(answers, True)


@pytest.fixture(scope="module")
def recorded(script, experiment, tmp_path_factory):
    """Two policies and two seeds, one by one and without an interruption."""
    out = tmp_path_factory.mktemp("record")
    return script.record(experiment, out, ["zero", "r"], 2, 1, never)


def without_times(rows):
    times = ("seconds", "images_per_second")
    return [{name: x for name, x in row.items() if name not in times} for row in rows]


@pytest.mark.parametrize("policy", transforms.POLICIES)
def test_radius_and_ratio_are_those_of_the_warmup(script, experiment, policy):
    """Though policy and t are traced: exactly, at every step."""
    traced = jax.jit(lambda policy, t: script.schedules_at(experiment, policy, t))
    gr = experiment.config.gr
    schedules = transforms.warmup(policy, radius=gr.radius, ratio=gr.ratio, warmup_steps=5)
    for t in range(1, experiment.total_steps + 1):
        expected = [x(jnp.int32(t)) if callable(x) else x for x in schedules]
        found = traced(script.POLICIES.index(policy), jnp.int32(t))
        np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_the_results(script, experiment, recorded):
    assert [(row["policy"], row["seed"]) for row in recorded] == [
        *(("zero", 0), ("r", 0), ("zero", 1), ("r", 1))
    ]
    for row in recorded:
        assert (row["steps"], row["side_by_side"], row["dtype"]) == (15, 1, "float32")
        assert row["device"] == "cpu" and row["seconds"] > 0
        assert row["images_per_second"] == pytest.approx(15 * 16 / row["seconds"])
        assert [point["step"] for point in row["curve"]] == [2, 4, 6, 8, 10, 12, 14, 15]
        assert row["curve"][-1].items() >= {name: row[name] for name in ("error", "loss")}.items()
        assert 0 <= row["error"] <= 1 and row["loss"] < row["curve"][0]["loss"]
    assert len({row["params_sha256"] for row in recorded}) == 4
    # A gradient is three forward passes: 15 images × 16 steps, two gradients a step, but one of the
    # 5 steps of zero-warmup.
    cost = {row["policy"]: row["flops"] for row in recorded}
    assert cost["zero"] / cost["r"] == pytest.approx((15 + 10) / 30)
    patches = 2 * (4 * 768 * 16 + 5 * 12 * 16 * 16 + 2 * 2 * 5 * 5 * 8 * 2 + 16 * 10)
    assert cost["r"] == pytest.approx(3 * 2 * 15 * 16 * patches, rel=0.02)


@pytest.mark.soak
def test_a_run_is_that_of_gnp_train(script, flags, program, recorded, tmp_path):
    """Two policies and two seeds; states of one by one and side by side."""
    config = script.parse(flags)[1]
    for policy in ("zero", "r"):
        side_by_side = program.train(program.init([0, 1]), [0, 1], policy, 0, 15)
        for seed, state in enumerate(program.each(side_by_side)):
            config.seed, config.gr.policy = seed, policy
            expected = train(config, tmp_path / f"{policy}-{seed}")
            (row,) = (r for r in recorded if (r["policy"], r["seed"]) == (policy, seed))
            for name in ("loss", "error"):
                assert row[name] == pytest.approx(expected["test"][name], rel=1e-5)
            assert row["train_loss"] == pytest.approx(expected["train"]["loss"], rel=1e-5)
            assert program.evaluate(state)["loss"] == pytest.approx(row["loss"], rel=1e-5)

            checkpoints = Checkpoints(tmp_path / f"{policy}-{seed}")
            theirs = checkpoints.restore(make_experiment(config).abstract_state).params
            checkpoints.close()
            alone = program.train(program.init([seed]), [seed], policy, 0, 15)
            for ours in (state, *program.each(alone)):
                jax.tree.map(
                    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                    ours.params,
                    theirs,
                )


def gr_state(state):
    """The state of the gradient regularization, the first of the chain."""
    return state.opt_state[0]


def test_one_program_for_all_policies_and_seeds_skips_what_is_not_needed(script, experiment):
    program = script.Program(experiment)
    for policy in script.POLICIES:
        for seed in (0, 7):
            state = program.train(program.init([seed]), [seed], policy, 0, 1)
            state = program.train(state, [seed], policy, 1, 2)
            (norm,) = gr_state(state).perturbed_grad_norm
            assert (norm > 0) == (policy not in ("off", "zero"))
    assert program.train_call._cache_size() == 1


@pytest.mark.parametrize("count", [1, 3])
def test_the_second_gradient_is_behind_a_branch(program, count):
    """Of several seeds too: a batched predicate would make a `select` of it."""
    seeds = np.arange(count, dtype=np.uint32)
    numbers = [np.int32(0)] * 3
    arguments = (program.init(seeds), seeds, *numbers, program.data.train_input())
    branches = list(conditionals(jax.make_jaxpr(program.train_call)(*arguments)))
    with_products = [sorted("dot_general" in str(b) for b in each) for each in branches]
    assert [each for each in with_products if any(each)] == [[False, True]]
    if count > 1:
        compiled = program.train_call.lower(*arguments).compile().as_text()
        assert " conditional(" in compiled


def conditionals(jaxpr):
    """The branches of every `cond` in a program."""
    for operation in jaxpr.eqns:
        if operation.primitive.name == "cond":
            yield operation.params["branches"]
        for inner in jax.extend.core.jaxprs_in_params(operation.params):
            yield from conditionals(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("side_by_side", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_after_every_call_it_ends_as_if_it_had_not_been(
    script, experiment, program, recorded, side_by_side, tmp_path, monkeypatch
):
    """Bit for bit; two seeds at once agree with one by one to rounding."""
    monkeypatch.setattr(script, "Program", lambda _: program)  # compiled already

    def go_on(policies, count, stop):
        return script.record(experiment, tmp_path, policies, 2, count, stop)

    rows, times = [], 0
    while len(rows) < 4:
        before, times = len(rows), times + 1
        rows = go_on(["zero", "r"], side_by_side, after_a_call())
        assert (tmp_path / "under_way.npz").exists() == (len(rows) == before)
    assert times > 10
    if side_by_side == 1:
        assert without_times(rows) == without_times(recorded)
    expected = {(row["policy"], row["seed"]): row["loss"] for row in recorded}
    for row in rows:
        assert row["loss"] == pytest.approx(expected[row["policy"], row["seed"]], rel=1e-5)
        assert row["side_by_side"] == side_by_side

    assert go_on(["r", "zero"], None, never) == rows
    # More may be asked for later: as many at once as before.
    more = go_on(["off", "r"], None, never)
    assert more[:4] == rows
    assert [(r["policy"], r["side_by_side"]) for r in more[4:]] == [("off", side_by_side)] * 2


def test_killed_between_the_results_and_the_end_of_what_was_under_way(
    script, experiment, program, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "Program", lambda _: program)
    script.record(experiment, tmp_path, ["off"], 1, 1, after_a_call())
    under_way = (tmp_path / "under_way.npz").read_bytes()
    rows = script.record(experiment, tmp_path, ["off"], 1, 1, never)
    (tmp_path / "under_way.npz").write_bytes(under_way)
    assert script.record(experiment, tmp_path, ["off"], 1, 1, never) == rows
    more = script.record(experiment, tmp_path, ["off"], 2, 1, never)
    assert [row["seed"] for row in more] == [0, 1]


def test_killed_it_goes_on_from_what_was_saved_last(
    script, experiment, program, recorded, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "Program", lambda _: program)
    monkeypatch.setattr(script, "SAVE_SECONDS", 0)
    evaluate, calls = program.evaluate, iter(range(100))

    def fail_later(state):
        if next(calls) == 4:
            raise MemoryError
        return evaluate(state)

    monkeypatch.setattr(program, "evaluate", fail_later)
    arguments = (experiment, tmp_path, ["zero"], 1, 1, never)
    with pytest.raises(MemoryError):
        script.record(*arguments)
    with np.load(tmp_path / "under_way.npz") as arrays:
        group = script.Group(**json.loads(str(arrays["group"])))
    assert 8 <= group.step < 10 and len(group.curves[0]) == 4
    assert without_times(script.record(*arguments)) == without_times(recorded[:1])


@pytest.mark.parametrize(("together", "alone", "chosen"), [(1.0, 2.0, 5), (2.0, 1.0, 1)])
def test_what_is_faster_is_chosen(script, monkeypatch, capsys, together, alone, chosen):
    times = {5: together, 1: alone}
    monkeypatch.setattr(script, "seconds_of_step", lambda _, seeds: times[len(seeds)])
    assert script.faster(None, 5) == chosen
    assert f"{1000 * together:.2f} ms with 5 seeds side by side" in capsys.readouterr().out


def test_seeds_that_do_not_fit_into_memory_are_trained_one_by_one(script, program, monkeypatch):
    assert 0 < script.seconds_of_step(program, range(1)) < 10

    def fail(message):
        def train(*_):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(program, "train", train)

    fail("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")
    assert script.seconds_of_step(program, range(2)) == np.inf
    fail("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError):
        script.seconds_of_step(program, range(2))


def test_the_table(script, flags, recorded, tmp_path, capsys):
    config = script.parse([*flags, "--config.optimizer.name=rmsprop"])[1]
    rows = [row | {"error": 0.1 + 0.02 * row["seed"], "seconds": 30.0} for row in recorded]
    script.report(config, ["none", "r", "zero"], rows, tmp_path / "table.jsonl")
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[1]: line.split(" | ") for line in lines if line.startswith("| `")}
    assert list(table) == ["`r`", "`zero`"]
    assert table["`r`"][1:4] == ["15.32 ± 0.21", "11.00 ± 1.41", "2"]
    assert table["`zero`"][1] == "15.06 ± 0.40" and table["`zero`"][-2] == "0.5"
    assert "4 runs" in lines[-1] and "in 2.0 minutes of training" in lines[-1]
    objects = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [o["name"] for o in objects] == ["r: test error", "zero: test error"]
    assert objects[0]["value"] == pytest.approx(11) and objects[0]["unit"] == "%"
    assert (objects[0]["seeds"], objects[0]["paper"]) == (2, 15.32)

    config.optimizer.name = "sgd"  # the paper has no such row
    script.report(config, ["r"], recorded[1:2], None)
    assert "| `r` | – | " in capsys.readouterr().out


def test_the_paper_s_figures(script):
    """Of every model, data set and optimizer: an error and its deviation for each policy."""
    assert len(script.PAPER) == 3 * 2 * 2
    for (model, name, _), text in script.PAPER.items():
        figures = np.array(text.split(), float).reshape(len(script.POLICIES), 2)
        low, high = (9, 17) if name == "cifar10" else (35, 41)
        assert ((figures[:, 0] > low) & (figures[:, 0] < high)).all(), (model, name)
        assert (figures[:, 1] < 1).all()
        assert figures[:, 0].argmin() == script.POLICIES.index("zero")  # the paper's claim


def test_the_warmup_keeps_its_share_of_other_epochs(script, flags):
    config = script.parse([*flags[:2], "--epochs=30", "--dtype=bfloat16"])[1]
    assert (config.epochs, config.lr.warmup, config.dtype) == (30, "4.000000ep", "bfloat16")
    assert script.parse(flags[:2])[1].lr.warmup == "40ep"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--policies=off,zreo", "unknown policy 'zreo'; did you mean 'zero'?"),
        ("--model=vit_tt", "did you mean 'vit_ti'?"),
        ("--data=cifar1", "did you mean 'cifar10'?"),
        ("--dtype=float", "did you mean 'float32'?"),
        ("--seeds=0", "--seeds must be above 0, got 0"),
        ("--minutes=nan", "--minutes must be above 0, got nan"),
        ("--seeds=two", "invalid int value: 'two'"),
        ("--vmap=all", "--vmap is 'all'; write auto, or how many seeds side by side"),
        ("--mintes=3", "unknown flag '--mintes'; did you mean '--minutes'?"),
        ("--config.gr.policy=off", "--config.gr.policy differs from run to run"),
        ("--config.gr.radus=1", "did you mean 'config.gr.radius'?"),
        ("--config.gr.radius=0", "config.gr.radius is 0; set a radius"),
    ],
)
def test_mistakes(script, flag, message):
    with pytest.raises(UserError) as error:
        script.parse(["--out=unused", flag])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_belongs_to_one_configuration(script, flags, tmp_path):
    script.claim(tmp_path / "out", script.parse(flags)[1])
    # The data may have moved, and other policies and seeds are no other configuration.
    moved = [*flags, "--data_dir=elsewhere", "--policies=off", "--seeds=9", "--minutes=3"]
    script.claim(tmp_path / "out", script.parse(moved)[1])
    for flag, field in (("--dtype=bfloat16", "dtype"), ("--config.lr.base=0.1", "lr.base")):
        with pytest.raises(UserError, match=rf"another configuration \(config\.{field}: "):
            script.claim(tmp_path / "out", script.parse([*flags, flag])[1])


def command(out, flags, *more):
    return [sys.executable, str(PATH), *flags[1:], f"--out={out}", "--policies=off,zero", *more]


@pytest.mark.slow
def test_the_command_stops_at_its_limit_or_by_ctrl_c_and_goes_on(flags, tmp_path):
    out, kinds = tmp_path / "out", {"capture_output": True, "text": True, "timeout": 300}
    long = [*flags, "--epochs=200", "--seeds=1"]
    done = subprocess.run(command(out, long, "--minutes=1e-4"), cwd=ROOT, **kinds)
    assert done.returncode == 0, done.stderr
    assert "stopped and saved; 2 of 2 runs are left. To go on:\n" in done.stdout
    assert f"scripts/cifar_record.py {long[1]}" in done.stdout.splitlines()[-1]

    process = subprocess.Popen(command(out, long), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "off, seed 0: step" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert "2 runs are left. To go on:" in process.communicate(timeout=300)[0]
    assert process.returncode == 130 and (out / "under_way.npz").exists()

    done = subprocess.run(command(out, long, "--config.lr.base=1"), cwd=ROOT, **kinds)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "config.lr.base: 0.001 there, 1.0 here" in done.stderr

    done = subprocess.run(command(out, long), cwd=ROOT, **kinds)
    assert done.returncode == 0, done.stderr
    assert "| `off` | 14.82 ± 0.64 | " in done.stdout and "runs are left" not in done.stdout
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["policy"], row["steps"]) for row in rows] == [("off", 1000), ("zero", 1000)]
    assert sorted(path.name for path in out.iterdir()) == [
        *(".lock", "config.json", "results.jsonl")
    ]
