"""Several processes that train one model: how this one finds the others."""

import argparse
import atexit
import importlib.util
import math
import os
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any

from gnp import peers
from gnp.errors import UserError
from gnp.peers import HEARTBEAT_TIMEOUT

# Of each launcher: the variables with the number of processes, this one's index among them, and
# its index among those of its host. For a launcher that is None there JAX finds it out.
_VARIABLES: dict[str, tuple[str | None, str | None, str | None]] = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "TPU": (None, None, None),
    "Kubernetes": (None, "JOB_COMPLETION_INDEX", None),
}
_BY_HAND = (
    "write --coordinator=HOST:PORT --num_processes=N --process_id=I, "
    "or --num_processes=1 to train in this process alone"
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `join` to a command line."""
    group = parser.add_argument_group(
        "several processes",
        "Found in the environment under srun and mpirun (Open MPI), and of TPU hosts on GKE.",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens, on a port of its host"
    )
    group.add_argument(
        "--num_processes", type=int, metavar="N", help="of all hosts; 1: alone, whatever is found"
    )
    group.add_argument("--process_id", type=int, metavar="I", help="this one's, 0 to N - 1")
    group.add_argument(
        "--distributed", action="store_true", help="join the processes that JAX finds (TPU pods)"
    )
    group.add_argument(
        "--join_timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="how long to wait for all processes (default: %(default)s)",
    )


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    forced: bool = False,
    timeout: float = 300,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Returns when all processes have joined, at once if this process is the only one.

    To be called before anything of JAX but its import; a process alone does not even import it.
    At the end of the program JAX waits for the other processes, 5 minutes at most.

    From then on an exception that nobody catches ends the process at once, and the end of one
    process ends all: the others tell it in one line and exit with `EX_TEMPFAIL`. That takes some 10
    seconds after an error or a kill, and `HEARTBEAT_TIMEOUT` and 15 more, at most, where the
    network, or a process that stands still, just falls silent. It rests on a part of JAX that is
    not public; should that change, jaxlib still aborts the others after as long.

    Args:
      coordinator: host and port at which process 0 listens.
      num_processes: how many processes there are. 1 stands above what the environment says.
      process_id: which of them this one is. What is None of these three is found in the
        environment, which must then say that there are several processes.
      forced: whether to ask JAX for the processes even if the environment does not tell of any.
      timeout: seconds to wait.
      environ: the environment variables.

    Raises:
      UserError: for arguments that are wrong or lack another, and if not all processes join.
    """
    if not 0 < timeout < math.inf:
        raise UserError(f"--join_timeout is {timeout:g}; it must be a number of seconds above 0")
    if coordinator is not None:
        _check_address(coordinator)
    launcher = None if num_processes == 1 else _launcher(environ)
    local_id = None
    if launcher:
        found = [_number(environ, name) for name in _VARIABLES[launcher]]
        num_processes = found[0] if num_processes is None else num_processes
        process_id = found[1] if process_id is None else process_id
        local_id = None if "JAX_LOCAL_DEVICE_IDS" in environ else found[2]
    _check_numbers(num_processes, process_id)
    asked = forced or launcher is not None
    known = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in known.items() if value is None]
    if num_processes == 1 or (len(missing) == 3 and not asked):
        return
    if missing and not asked:
        raise UserError(f"{' and '.join(missing)} must be given too; {_BY_HAND}")
    if missing and launcher == "Kubernetes" and not importlib.util.find_spec("kubernetes"):
        raise UserError(
            "this pod is one of an indexed Job, but its command does not say where the others "
            "are; write --coordinator=HOST:PORT --num_processes=N, or --num_processes=1 to train "
            "in this pod alone"
        )
    if coordinator is not None and process_id == 0:
        _check_port_is_free(coordinator)
    _initialize(
        timeout,
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        # Under SLURM and Open MPI one device for each process, as JAX has it too.
        local_device_ids=None if local_id is None else [local_id],
        # JAX's detection may ask servers of the network, which is of no use if all is known.
        cluster_detection_method=None if missing else "deactivate",
    )


def _launcher(environ: Mapping[str, str]) -> str | None:
    """What has started several processes of which this is one, or None.

    In the order in which JAX looks for them.
    """
    if (_number(environ, "OMPI_COMM_WORLD_SIZE") or 0) > 1:
        return "Open MPI"
    # The shell of sbatch has SLURM_NTASKS and SLURM_PROCID as well, but it is not a task of srun.
    if (_number(environ, "SLURM_STEP_NUM_TASKS") or 0) > 1 and "SLURM_PROCID" in environ:
        return "SLURM"
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return "TPU"
    if "JOB_COMPLETION_INDEX" in environ and "KUBERNETES_SERVICE_HOST" in environ:
        return "Kubernetes"
    return None


def _number(environ: Mapping[str, str], name: str | None) -> int | None:
    text = environ.get(name, "") if name else ""
    return int(text) if text.isdecimal() else None


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator={coordinator} is no address; write HOST:PORT, such as 10.0.0.1:1234"
        )


def _check_port_is_free(coordinator: str) -> None:
    """Raises if process 0 cannot listen at its port; jaxlib 0.10 ends with a segfault then."""
    port = int(coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError:
        raise UserError(
            f"process 0 cannot listen at port {port} of this host, which is in use or not allowed; "
            "write another port in the --coordinator of every process"
        ) from None


def _check_numbers(num_processes: int | None, process_id: int | None) -> None:
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num_processes is {num_processes}; it must be 1 or more")
    if process_id is not None and not 0 <= process_id < (num_processes or math.inf):
        last = "N - 1" if num_processes is None else num_processes - 1
        raise UserError(
            f"--process_id is {process_id}; it must be 0 to {last} with "
            f"--num_processes={num_processes or 'N'}"
        )


def _initialize(timeout: float, **arguments: Any) -> None:
    """`jax.distributed.initialize`, with a `UserError` in one line for whatever goes wrong."""
    import jax

    # It would take SIGTERM and do nothing; the training loop saves the run.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def initialize() -> None:
        try:
            # If JAX is the one that gives up, it aborts the process with a trace of its calls.
            jax.distributed.initialize(
                initialization_timeout=math.ceil(timeout) + 60,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                **arguments,
            )
        except Exception as error:
            failures.append(error)

    # In a thread, so that the end of waiting and Ctrl-C come through.
    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(timeout)
    number, count = arguments["process_id"], arguments["num_processes"]
    where = arguments["coordinator_address"]
    this = "this process" if number is None else f"process {number}"
    this += "" if count is None else f" of {count}"
    if thread.is_alive():
        # Before JAX's own end, which would wait and complain.
        atexit.register(peers.leave_at_once, 2)
        raise UserError(
            f"{this} waited {timeout:g} s for the others"
            + (f", with process 0 at {where}" if where else "")
            + "; check that each has started and reaches the port, or raise --join_timeout"
        )
    if failures:
        reason = (str(failures[0]).splitlines() or [repr(failures[0])])[0].rstrip(".")
        raise UserError(f"{this} cannot join the others: {reason}; {_BY_HAND}") from failures[0]
    sys.excepthook = peers.end_at_once
    peers.watch()
