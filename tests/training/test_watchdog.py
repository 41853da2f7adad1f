"""What is said when nothing moves, and that nothing is said otherwise."""

import contextlib
import multiprocessing
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gnp.data.records import ArrayRecords
from gnp.data.streaming import EvalReader, StreamFeed, show_worker_stacks
from gnp.errors import UserError
from gnp.training.watchdog import Watchdog


def wait_for(text, read, seconds=60.0):
    """What is read until the text is in it."""
    shown, until = "", time.monotonic() + seconds
    while text not in shown:
        assert time.monotonic() < until, shown
        time.sleep(0.02)
        shown += read()
    return shown


def watchers():
    return [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_silence_is_told_with_all_stacks_and_its_end_too(capfd):
    def stands_still(event):
        event.wait()

    event = threading.Event()
    other = threading.Thread(target=stands_still, args=[event], daemon=True)
    other.start()

    def read():
        return capfd.readouterr().err

    with Watchdog(0.2) as watchdog:
        watchdog.alive("training to step 7")
        watchdog.alive("waiting for the data of step 120")
        shown = wait_for("nothing has moved for 0.8 s", read)
        watchdog.alive("training to step 121")
        shown += wait_for("moving again after", read)
        # From then on it is as it was in the beginning.
        shown += wait_for("nothing has moved for 0.2 s, last: training to step 121", read)
    event.set()
    other.join()
    lines = [line for line in shown.splitlines() if "moved" in line or "moving" in line]
    told = "last: waiting for the data of step 120; the stacks of all threads follow"
    assert lines[:3] == [f"nothing has moved for {x} s, {told}" for x in ("0.2", "0.4", "0.8")]
    assert len(lines) == 5 and lines[3].startswith("moving again after ")
    assert shown.count("in stands_still") >= 4 and shown.count("in wait_for") >= 3
    assert not watchers()


@pytest.mark.parametrize("seconds", [0, None])
def test_it_can_be_left_out(seconds):
    with Watchdog(seconds) as watchdog:
        watchdog.alive("anything")
        assert not watchers()


def test_what_moves_is_not_told(capfd):
    with Watchdog(1.0) as watchdog:
        for _ in range(15):
            time.sleep(0.1)
            watchdog.alive("moving")
    assert capfd.readouterr().err == ""
    assert not watchers()


def test_it_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), Watchdog(10):
        raise ZeroDivisionError
    assert not watchers()


STOPPED = """
import time
from gnp.errors import UserError
from gnp.training.watchdog import Watchdog
with Watchdog(2) as watchdog:
    for _ in range(4):
        watchdog.alive("moving")
        print(flush=True)
        for _ in range(10):
            time.sleep(0.1)
"""


@pytest.mark.slow
def test_a_process_that_was_stopped_has_not_been_silent():
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", STOPPED],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.kill)
        for _ in range(2):
            process.stdout.readline()
        time.sleep(0.5)  # half of its silence
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


class Stuck(ArrayRecords):
    """Records on storage that does not answer."""

    def __getitem__(self, i):
        self.does_not_answer()

    def does_not_answer(self):
        time.sleep(600)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what a process expects")
def test_the_stacks_of_data_workers_are_shown_and_one_that_starts_is_spared(capfd):
    records = Stuck(np.zeros((8, 4, 4, 3), np.uint8), np.zeros(8, np.int32), "train")
    reader = EvalReader(records, (4, 4, 3), True, batch_size=2, skip_damaged=False)

    def read():
        show_worker_stacks()  # from the moment that there is a process
        return capfd.readouterr().err

    feed = StreamFeed(reader, sharding=on_one_device(), num_workers=1, told=set())
    wait_for("in does_not_answer", read)
    while feed._thread.is_alive():  # it would be waited for
        for child in multiprocessing.active_children():
            child.kill()
        time.sleep(0.1)
    with pytest.raises(UserError, match="was killed by signal 9"):
        feed.get()


def on_one_device():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    return NamedSharding(mesh, PartitionSpec("data"))
