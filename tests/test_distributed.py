"""How a process finds the others, from flags and from the environment, and how it ends."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from gnp import distributed
from gnp.errors import EX_TEMPFAIL, UserError

ROOT = pathlib.Path(__file__).parents[1]
ADDRESS = "10.0.0.1:1234"
SBATCH = {  # of the shell that sbatch starts, as `env` shows it there
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SRUN = SBATCH | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[01-02]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.2", "JOB_COMPLETION_INDEX": "3"}
PROGRAM = """
import os, signal, time
from gnp import distributed
from gnp.command_line import Parser, run
from gnp.errors import EX_TEMPFAIL, UserError

def main():
    parser = Parser("x", "")
    distributed.add_flags(parser)
    parser.add_argument("--end", default="")
    parser.add_argument("--who", type=int, default=1)
    flags = parser.parse_args()
    distributed.join(flags.coordinator, flags.num_processes, flags.process_id,
                     forced=flags.distributed, timeout=flags.join_timeout)
    import jax
    from jax.experimental.multihost_utils import process_allgather
    number = jax.process_index()
    print(number, jax.process_count(), process_allgather(jax.numpy.array(number)).tolist())
    if flags.end.startswith("SIG") and number == flags.who:
        os.kill(os.getpid(), getattr(signal, flags.end))
    if flags.end == "exception" and number == flags.who:
        raise ValueError(f"an error of process {number} alone")
    if flags.end == "mistake" and number == flags.who:
        raise UserError(f"a mistake that process {number} has found")
    if flags.end == "waiting":  # not in a collective operation
        time.sleep(600)
    if flags.end:
        process_allgather(jax.numpy.array(number))
    return 0

run(main)
"""


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of `jax.distributed.initialize`, which does nothing else."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return calls


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def environment(**variables):
    """The environment without what a launcher of these tests may have put there."""
    launchers = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JOB_", "KUBERNETES_", "JAX_COORD")
    kept = {name: x for name, x in os.environ.items() if not name.startswith(launchers)}
    return kept | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | variables


@contextlib.contextmanager
def start(command, env=None):
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SBATCH,
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.2"},  # a pod, but not of an indexed Job
    ],
)
def test_a_process_alone_does_not_initialize(calls, environ):
    distributed.join(environ=environ)
    distributed.join(num_processes=1, environ=environ)
    distributed.join(ADDRESS, 1, 0, environ=environ)
    assert calls == []


@pytest.mark.parametrize("environ", [SRUN, MPIRUN, POD, {"TPU_WORKER_HOSTNAMES": "a,b"}])
def test_num_processes_1_stands_above_the_environment(calls, environ):
    distributed.join(num_processes=1, environ=environ)
    assert calls == []


@pytest.mark.parametrize(
    ("environ", "known"),
    [
        (SRUN, (4, 3, [1])),
        (SRUN | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, (4, 3, None)),
        (MPIRUN, (4, 3, [1])),
        (MPIRUN | SBATCH, (4, 3, [1])),  # mpirun in a job of SLURM
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"} | POD, (None, None, None)),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, (None, None, None)),
    ],
)
def test_what_a_launcher_says_is_taken_and_the_rest_left_to_jax(calls, environ, known):
    distributed.join(environ=environ, timeout=7)
    (call,) = calls
    assert call.pop("initialization_timeout") > 7  # the end of waiting is not JAX's
    assert call.pop("heartbeat_timeout_seconds") == distributed.HEARTBEAT_TIMEOUT
    assert call == {
        "coordinator_address": None,
        "num_processes": known[0],
        "process_id": known[1],
        "local_device_ids": known[2],
        "cluster_detection_method": None,
    }


@pytest.mark.parametrize("environ", [{}, SRUN, MPIRUN, POD])
def test_flags_stand_above_the_environment(calls, environ):
    distributed.join(ADDRESS, 8, 5, environ=environ)
    (call,) = calls
    assert call["coordinator_address"] == ADDRESS
    assert (call["num_processes"], call["process_id"]) == (8, 5)
    assert call["cluster_detection_method"] == "deactivate"


def test_forced_asks_jax(calls):
    distributed.join(forced=True, environ={})
    (call,) = calls
    assert {call[name] for name in ("coordinator_address", "num_processes", "process_id")} == {None}
    assert call["cluster_detection_method"] is None


def test_a_pod_of_an_indexed_job_needs_the_address_and_the_number(calls, monkeypatch):
    find_spec = distributed.importlib.util.find_spec
    without = {"kubernetes": None}
    monkeypatch.setattr(
        distributed.importlib.util, "find_spec", lambda name: without.get(name, find_spec)
    )
    with pytest.raises(UserError, match="write --coordinator=HOST:PORT --num_processes=N, or"):
        distributed.join(environ=POD)
    distributed.join(ADDRESS, 4, environ=POD)
    assert calls[0]["process_id"] == 3
    without.clear()
    distributed.join(environ=POD)
    assert calls[1]["coordinator_address"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ADDRESS, None, None), "--num_processes and --process_id must be given too"),
        ((None, 2, 0), "--coordinator must be given too"),
        ((None, None, 0), "--coordinator and --num_processes must be given too"),
        (("10.0.0.1", 2, 0), "--coordinator=10.0.0.1 is no address; write HOST:PORT"),
        ((":1234", 2, 0), "is no address"),
        (("host:port", 2, 0), "is no address"),
        (("host:65536", 2, 0), "is no address"),
        ((ADDRESS, 2, 2), "--process_id is 2; it must be 0 to 1 with --num_processes=2"),
        ((ADDRESS, 2, -1), "--process_id is -1; it must be 0 to 1"),
        ((ADDRESS, None, -1), "it must be 0 to N - 1"),
        ((ADDRESS, 0, 0), "--num_processes is 0; it must be 1 or more"),
        ((ADDRESS, 1, 1), "--process_id is 1; it must be 0 to 0 with --num_processes=1"),
    ],
)
def test_mistakes_in_the_flags(calls, arguments, message):
    with pytest.raises(UserError) as caught:
        distributed.join(*arguments, environ={})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert calls == []


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_mistakes_in_the_timeout(calls, timeout):
    with pytest.raises(UserError, match="--join_timeout is"):
        distributed.join(ADDRESS, 2, 1, timeout=timeout, environ={})
    assert calls == []


def test_a_failure_of_jax_is_one_line(monkeypatch, calls):
    def fail(**given):
        raise RuntimeError("no metadata\nin detail")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"cannot join the others: no metadata; write [^\n]*\Z"):
        distributed.join(forced=True, environ={})


def test_a_process_alone_does_not_import_jax():
    code = (
        "from gnp import distributed; distributed.join(); import sys; print('jax' in sys.modules)"
    )
    with start(["-c", code]) as process:
        assert process.communicate(timeout=60) == ("False\n", "")


def launched(how, number, port):
    """The flags and the environment of process `number` of 2."""
    if how == "flags":
        return [
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={number}",
        ], environment()
    variables = {
        "srun": SRUN
        | {
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number),
        },
        "mpirun": {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(number),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
        },
    }[how]
    return [], environment(**variables, JAX_COORDINATOR_PORT=str(port))


@pytest.mark.parametrize("how", ["flags", "srun", "mpirun"])
def test_two_processes_join_and_end(how):
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(2):
            flags, env = launched(how, number, port)
            command = ["-c", PROGRAM, "--join_timeout=60", *flags]
            processes.append(stack.enter_context(start(command, env)))
        for number, process in enumerate(processes):
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert f"{number} 2 [0, 1]" in out.splitlines()


AGAIN = "; start all processes again: they go on from the last checkpoint\n"


def message(err):
    """The one line that is ours; jaxlib has its own log."""
    (line,) = [line for line in err.splitlines(keepends=True) if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("end", "who", "code", "told"),
    [
        ("exception", 1, 1, "ended: ValueError: an error of process 1 alone"),
        ("SIGTERM", 1, -signal.SIGTERM, "has ended or cannot be reached"),
        pytest.param("exception", 0, 1, "ended: ValueError: an error", marks=pytest.mark.slow),
        pytest.param("mistake", 1, 2, "ended: a mistake that process 1", marks=pytest.mark.slow),
        pytest.param("mistake", 0, 2, "ended: a mistake that process 0", marks=pytest.mark.slow),
        pytest.param("SIGKILL", 0, -9, "has ended or cannot be reached", marks=pytest.mark.slow),
    ],
)
def test_the_end_of_one_process_ends_the_other(end, who, code, told):
    """JAX by itself would let both wait for 5 minutes, and take SIGTERM for itself."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                start(
                    [
                        *("-c", PROGRAM, f"--end={end}", f"--who={who}"),
                        *launched("flags", number, port)[0],
                    ]
                )
            )
            for number in range(2)
        ]
        one, other = processes[who], processes[1 - who]
        _, err = one.communicate(timeout=60)
        assert one.returncode == code, err
        assert end != "exception" or f"ValueError: an error of process {who} alone" in err
        assert (
            end != "mistake" or message(err) == f"error: a mistake that process {who} has found\n"
        )
        _, err = other.communicate(timeout=60)
        assert other.returncode == EX_TEMPFAIL == 75, err
        assert message(err).startswith(f"error: process {who} of 2 {told}")
        assert message(err).endswith(AGAIN)


@pytest.mark.parametrize(
    "who", [pytest.param(0, marks=pytest.mark.soak), pytest.param(1, marks=pytest.mark.slow)]
)
def test_a_process_that_falls_silent_is_not_waited_for(who):
    """As one whose host or network is lost; the others wait in no collective operation."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(2):
            flags, env = launched("flags", number, port)
            command = ["-u", "-c", PROGRAM, "--end=waiting", *flags]
            processes.append(stack.enter_context(start(command, env)))
        for number, process in enumerate(processes):
            while not process.stdout.readline().startswith(f"{number} 2"):
                assert process.poll() is None
        time.sleep(3)
        processes[who].send_signal(signal.SIGSTOP)
        _, err = processes[1 - who].communicate(timeout=distributed.HEARTBEAT_TIMEOUT + 15)
    assert processes[1 - who].returncode == 75, err
    assert message(err) == f"error: process {who} of 2 has ended or cannot be reached{AGAIN}"


@pytest.mark.parametrize(
    "who", [pytest.param(0, marks=pytest.mark.soak), pytest.param(1, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_when_all_are_started_again_after_one_was_killed(tmp_path, who):
    def both(stack):
        port = free_port()
        return [
            stack.enter_context(
                train(
                    tmp_path,
                    *launched("flags", number, port)[0],
                    *("--config.epochs=5", "--config.checkpoint.every=20st"),
                )
            )
            for number in range(2)
        ]

    checkpoints = tmp_path / "run" / "checkpoints"
    with contextlib.ExitStack() as stack:
        processes = both(stack)
        until = time.monotonic() + 300
        while not list(checkpoints.glob("[1-9]*0")):
            assert time.monotonic() < until
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.02)
        processes[who].kill()
        killed = time.monotonic()
        _, err = processes[1 - who].communicate(timeout=60)
        assert time.monotonic() - killed < distributed.HEARTBEAT_TIMEOUT + 15
        assert processes[1 - who].returncode == 75, err
        assert message(err) == f"error: process {who} of 2 has ended or cannot be reached{AGAIN}"
    assert not (tmp_path / "run" / "result.json").exists()
    with contextlib.ExitStack() as stack:
        again = both(stack)
        outcomes = [process.communicate(timeout=280) for process in again]
    assert [process.returncode for process in again] == [0, 0], outcomes
    assert "continues at step" in outcomes[0][1]
    assert (tmp_path / "run" / "result.json").exists()


def train(tmp_path, *flags):
    return start(
        ["-m", "gnp.train", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", *flags]
    )


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_waits_in_vain_ends_with_one_line(tmp_path, number):
    flags, _ = launched("flags", number, free_port())
    with train(tmp_path, *flags, "--join_timeout=2") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith(f"error: process {number} of 2 waited 2 s for the others"), err
    assert err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("", 0)) as server:
        flags, _ = launched("flags", 0, server.getsockname()[1])
        with train(tmp_path, *flags) as process:
            _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: process 0 cannot listen at port"), err
    assert err.count("\n") == 1, err


def test_where_jax_finds_no_other_process_distributed_is_one_line(tmp_path):
    with train(tmp_path, "--distributed") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "write --coordinator=HOST:PORT" in err and err.count("\n") == 1, err


def test_ctrl_c_ends_the_waiting(tmp_path):
    port = free_port()
    flags, _ = launched("flags", 0, port)
    with train(tmp_path, *flags) as process:
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        time.sleep(0.5)  # it listens for a moment before it waits
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "interrupted\n")
