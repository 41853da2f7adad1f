"""What processes agree on, among two real ones."""

import contextlib
import json
import socket
import subprocess
import sys

import pytest

from gnp.training.processes import all_true, refuse_differences

PROGRAM = """
import json, sys
import jax
number = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, number, shutdown_timeout_seconds=20)
from gnp.errors import UserError
from gnp.training.processes import all_true, refuse_differences
for given in json.loads(sys.argv[3]):
    try:
        refuse_differences(given[number])
        print(json.dumps("the same"))
    except UserError as error:
        print(json.dumps(str(error)))
for flags in [(True, True), (True, False), (False, True), (False, False)]:
    print(json.dumps(all_true(flags[number])))
"""
START = "; start all processes with the same configuration and installation"


def two_processes(cases):
    """What each of two processes says in turn; `cases` are pairs of what they have."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, address, str(i), json.dumps(cases)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for i in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        outcomes = [process.communicate(timeout=120) for process in processes]
    for process, (_, err) in zip(processes, outcomes, strict=True):
        assert process.returncode == 0, err
    # Gloo announces itself on the standard output.
    return [
        [json.loads(line) for line in out.splitlines() if not line.startswith("[Gloo]")]
        for out, _ in outcomes
    ]


def test_what_differs_is_named_and_nothing_else():
    config = {"lr": {"base": 0.01, "warmup": "5%"}, "model": {"name": "vit_ti"}, "mesh": {}}
    same = {"config": config, "jax": "1"}
    long = "x" * 5000
    cases = [
        (same, json.loads(json.dumps(same))),
        (same, same | {"config": config | {"lr": {"base": 0.1, "warmup": "5%"}}}),
        # Of other lengths, with fields that one lacks; in another order, which is no difference.
        ({"jax": "1", "long": ""}, {"code": [1, None], "long": long, "jax": "1"}),
        ({"seed": 1}, {"seed": True}),
        ({"rate": float("nan")}, {"rate": float("nan")}),
        ({str(i): 0 for i in range(100)}, {str(i): 1 for i in range(100)}),
        ({"name": "größer"}, {"name": "größer"}),
    ]
    (*first, _, _, _, _), (*second, _, _, _, _) = said = two_processes(cases)
    assert first == second
    assert first[0] == "the same"
    assert first[1] == f"process 1 has config.lr.base 0.1, process 0 0.01{START}"
    assert first[2] == (
        "process 1 has code [1, null], process 0 not at all; "
        f'process 1 has long "{"x" * 77} …, process 0 ""{START}'
    )
    assert first[3] == f"process 1 has seed true, process 0 1{START}"
    assert first[4] == "the same"
    assert first[5].count("process 1 has ") == 6 and f"; and 94 more{START}" in first[5]
    assert first[6] == "the same"
    assert [flags for *_, a, b, c, d in said for flags in [(a, b, c, d)]] == [
        (True, False, False, False)
    ] * 2


def test_a_process_alone_agrees_with_itself():
    refuse_differences({"anything": object()})
    assert all_true(True) and not all_true(False)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "process 3 has"),
        ([1, 2], "processes 1 and 2 have"),
        (range(1, 256), "processes 1, 2, 3, 4 and 251 more have"),
    ],
)
def test_many_processes_are_named_in_few_words(numbers, text):
    from gnp.training import processes

    assert processes._named(numbers) == text
