"""One device, eight, two axes, two processes: the same run, up to the order of sums."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp import config as gnp_config
from gnp.errors import UserError
from gnp.training import train
from gnp.training.evaluation import evaluate_checkpoint
from gnp.training.processes import Agreement, errors_shared, whole
from gnp.training.sharding import make_mesh, of_state


def make_config(**fields):
    """SGD: Adam makes a whole step of the rounding error in a gradient that is near zero."""
    config = gnp_config.default()
    config.model.update({"width": 16, "depth": 2, "num_heads": 2})
    config.data.update({"batch_size": 96, "augment": "pad_crop:1,flip,mixup"})
    # A streamed set would estimate its own.
    config.data.update({"mean": (0.3,), "std": (0.4,)})
    config.epochs = 0.5  # 7 steps
    config.optimizer.name = "sgd"
    config.lr.update({"base": 0.05, "warmup": "3st"})
    config.gr.policy = "zero"
    config.log.every = "2st"
    config.mesh.update({"data": 1, "min_size": 64})
    for field, text in fields.items():
        gnp_config.override(config, field.replace("__", "."), str(text))
    return config


def losses(workdir):
    """Of training and of the test set."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    train(make_config(), workdir)
    return workdir


# Sums over the batch in another order: some ulps of float32, grown over 7 steps.
TOLERANCE = 1e-6


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"mesh__data": 8}, marks=pytest.mark.slow),
        {"mesh__data": 4, "mesh__fsdp": 2},
        pytest.param({"mesh__data": 2, "mesh__fsdp": 2, "accumulate": 4}, marks=pytest.mark.slow),
    ],
    ids=["8 x 1", "4 x 2", "2 x 2, accumulated"],
)
def test_every_layout_trains_alike(one, tmp_path, layout):
    result = train(make_config(**layout), tmp_path)
    devices = layout["mesh__data"] * layout.get("mesh__fsdp", 1)
    assert result["devices"] == f"{jax.devices()[0].device_kind} × {devices}"
    np.testing.assert_allclose(losses(tmp_path), losses(one), rtol=TOLERANCE)


@pytest.mark.slow
def test_a_run_goes_on_with_another_layout(one, tmp_path):
    """Its parameters are cut otherwise than when they were saved."""
    config = make_config(mesh__data=2, mesh__fsdp=4, checkpoint__every="4st")
    train(config, tmp_path)
    for path in (tmp_path / "result.json", tmp_path / "checkpoints" / "7"):
        subprocess.run(["rm", "-r", path], check=True)
    train(make_config(mesh__data=8, checkpoint__every="4st"), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(one), rtol=TOLERANCE)


PROGRAM = """
import sys, jax, json, pathlib
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), shutdown_timeout_seconds=20)
sys.path.insert(0, sys.argv[3])
from gnp.training import Interrupted, train
from tests.training.test_layouts import make_config
fields = json.loads(sys.argv[5])
try:
    print(train(make_config(**fields), sys.argv[4])["params_sha256"])
except Exception as error:
    print(repr(error))
"""


def two_processes(workdir, **fields):
    """The last lines and the errors of two processes of four devices that train together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(i), root, workdir, json.dumps(fields)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"XLA_FLAGS": flags},
            cwd=root,
            text=True,
        )
        for i in range(2)
    ]
    outcomes = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, outcomes, strict=True):
        assert process.returncode == 0, err
    # Gloo announces itself on the standard output.
    return [(out.splitlines()[-1], err) for out, err in outcomes]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(
            {"mesh__data": 4, "mesh__fsdp": 2, "ema__decay": 0.9},
            id="kept, 4 x 2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"mesh__data": 8, "data__resident": "false"},
            id="streamed, 8 x 1",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_two_processes_train_like_one(one, tmp_path, fields):
    """And what they save is read and evaluated by one."""
    (first, shown), (second, silent) = two_processes(tmp_path, **fields)
    assert first == second and len(first) == 64
    assert "step 6/7" in shown and "step 6/7" not in silent
    np.testing.assert_allclose(losses(tmp_path), losses(one), rtol=TOLERANCE)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["devices"].endswith("× 8")
    values = evaluate_checkpoint(make_config(**fields), tmp_path)["test"]
    assert values["error"] == pytest.approx(result["test"]["error"])
    assert values["loss"] == pytest.approx(result["test"]["loss"], rel=1e-6)
    if "ema__decay" in fields:
        assert values["ema_loss"] == pytest.approx(result["test"]["ema_loss"], rel=1e-6)


def test_an_error_of_one_process_ends_all(tmp_path):
    """Only the first looks at the work directory's configuration."""
    (tmp_path / "config.json").write_text("{")
    (first, _), (second, _) = two_processes(tmp_path, mesh__data=8)
    assert first.startswith("UserError") and "is not valid JSON" in first
    assert second.startswith("UserError('process 0 of 2: ") and "is not valid JSON" in second


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def layout(state, **arguments):
    mesh = make_mesh(2, 4, batch_size=8)
    arguments = {"min_size": 32} | arguments
    return jax.tree.map(lambda s: tuple(s.spec), of_state(state, mesh, **arguments))


def test_large_parameters_are_cut_along_their_largest_axis():
    state = {
        "square": shape(8, 8),
        "stacked": shape(12, 4, 16),
        "odd": shape(12, 17),
        "not divisible": shape(9, 17),
        "small": shape(4),
    }
    assert layout(state) == {
        "square": (None, "fsdp"),
        "stacked": (None, None, "fsdp"),
        "odd": ("fsdp",),
        "not divisible": (),
        "small": (),
    }


def test_rules_decide_before_the_size():
    state = {"params": {"a": shape(8, 8), "b": {"kernel": shape(4, 16)}}, "mu": {"a": shape(8, 8)}}
    rules = ("params/a=0", "b/.*=none", "a=none")
    assert layout(state, rules=rules) == {
        "params": {"a": ("fsdp",), "b": {"kernel": ()}},
        "mu": {"a": ()},
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("a=2", r"'a=2' matches params/a, whose shape \(8, 6\) has no axis 2 that 4 devices"),
        ("a=1", r"has no axis 1 that 4 devices divide"),
        ("b=0", r"'b=0' decides nothing"),
        ("a", r"'a' is no rule; write PATTERN=AXIS or PATTERN=none"),
        ("(=0", r"'\(=0' is no rule"),
    ],
)
def test_rules_that_cannot_be(rule, message):
    with pytest.raises(UserError, match=message):
        layout({"params": {"a": shape(8, 6)}}, rules=(rule,))


def test_devices_that_do_not_fit():
    with pytest.raises(UserError, match=r"config.mesh.fsdp is 3, which does not divide the 8 dev"):
        make_mesh(-1, 3, batch_size=24)
    with pytest.raises(UserError, match=r"config.mesh.data is 3 and config.mesh.fsdp 4, but there"):
        make_mesh(3, 4, batch_size=24)


def test_one_process_agrees_with_itself():
    agreement = Agreement(make_mesh(2, batch_size=2), (False, 1.0))
    assert agreement.exchange(True, 2.0) == (True, 2.0)
    with pytest.raises(UserError, match="mine"), errors_shared():
        raise UserError("mine")
    assert whole(jnp.arange(3)).tolist() == [0, 1, 2]
