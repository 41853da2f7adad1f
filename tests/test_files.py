"""Files that are there whole or not at all, and directories that one process writes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from etils import epath

from gnp import files
from gnp.errors import UserError
from gnp.files import lock, remove_unfinished, write_atomically
from tests.small_disk import ROOT, small_disk

# The beginning of a program that uses these, without JAX, which is slow to import.
PROGRAM = f"""
import sys, types
package = types.ModuleType("gnp.training")
package.__path__ = [{str(ROOT / "gnp" / "training")!r}]
sys.modules["gnp.training"] = package
sys.path.insert(0, {str(ROOT)!r})
import os, pathlib, subprocess, time
from gnp.files import lock, write_atomically
"""


def program(text, *arguments):
    command = [sys.executable, "-c", PROGRAM + text, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", [pathlib.Path, epath.Path])
def test_text_and_bytes_take_the_place_of_what_was_there(tmp_path, kind):
    path = kind(tmp_path) / "größe.json"
    write_atomically(path, "äöü\r\n")
    assert path.read_bytes() == "äöü\r\n".encode()
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_leaves_the_old_file_and_nothing_else():
    with small_disk(kib=64) as disk:
        (disk.path / "file").write_text("old")
        disk.fill(leave=8192)
        told = disk.python(
            PROGRAM
            + """
try:
    write_atomically(pathlib.Path("file"), "x" * 20_000)
except OSError as error:
    print(error.strerror)
"""
        )
        assert told.splitlines() == ["No space left on device"]
        assert {path.name for path in disk.path.iterdir()} == {"file", ".filler"}
        assert (disk.path / "file").read_text() == "old"


def test_killed_at_any_time_it_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    text = """
number = int(sys.argv[2])
while True:
    number += 1
    write_atomically(pathlib.Path(sys.argv[1]), f"{number:06}" * 5000)
    print(number, flush=True)
"""
    last = 0
    for _ in range(3):
        with program(text, path, last) as process:
            for _ in range(20):
                process.stdout.readline()
            process.kill()
        there = path.read_text()
        assert there == there[:6] * 5000
        assert int(there[:6]) > last
        last = int(there[:6])


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    """Of the files named; others may be being written by others."""
    text = """
import signal
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(pathlib.Path(sys.argv[1]), "half")
"""
    with program(text, tmp_path / "a.json") as process:
        assert process.wait(60) == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left == f".a.json.{process.pid}.tmp"
    for name in ("a.json", ".b.json.1.tmp"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path, ["a.json"])
    assert sorted(os.listdir(tmp_path)) == [".b.json.1.tmp", "a.json"]


def test_who_holds_a_directory_is_said(tmp_path):
    text = """
with lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
    with program(text, tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error, lock(tmp_path):
            pass
        process.kill()
    begin, _, since = str(error.value).partition(" since ")
    assert begin == (
        f"process {process.pid} on {socket.gethostname()} has been training in {tmp_path}"
    )
    assert since.startswith("20")
    assert since.endswith("; wait for its end, or choose another --workdir")
    with lock(epath.Path(tmp_path)):  # once it is killed
        assert f'"process": {os.getpid()},' in (tmp_path / ".lock").read_text()


@pytest.mark.parametrize("there", ["", "{", "[]", "\0" * 50])
def test_who_holds_a_directory_need_not_be_known(tmp_path, there):
    with lock(tmp_path):
        (tmp_path / ".lock").write_text(there)
        with pytest.raises(UserError, match=f"another process is training in {tmp_path}; wait"):
            lock(tmp_path).__enter__()


def test_children_that_outlive_a_killed_process_do_not_hold_its_lock(tmp_path):
    """Forked by itself or by multiprocessing, spawned, and programs."""
    text = """
import multiprocessing
if __name__ == "__main__":
    with lock(pathlib.Path(sys.argv[1])):
        children = [os.fork()]
        if not children[0]:
            time.sleep(600)
        for method in ("fork", "forkserver", "spawn"):
            child = multiprocessing.get_context(method).Process(target=time.sleep, args=(600,))
            child.start()
            children.append(child.pid)
        # Its parent closes no file for it.
        children.append(subprocess.Popen(["sleep", "600"], close_fds=False).pid)
        print(*children, flush=True)
        time.sleep(600)
"""
    with program(text, tmp_path) as process:
        children = [int(number) for number in process.stdout.readline().split()]
        try:
            assert len(children) == 5
            with pytest.raises(UserError, match=f"process {process.pid} on "):
                lock(tmp_path).__enter__()
            process.kill()
            process.wait()
            for child in children:
                os.kill(child, 0)  # each is there
            with lock(tmp_path):
                pass
        finally:
            process.kill()
            for child in children:
                os.kill(child, signal.SIGKILL)


def test_a_child_that_is_forked_leaves_its_parent_the_lock(tmp_path):
    with lock(tmp_path):
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(UserError, match="training in"):
            lock(tmp_path).__enter__()


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, name):
    """The only one that is not real: the file systems here have locks."""
    number = getattr(files.errno, name)

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with lock(tmp_path):
        assert f"{tmp_path} cannot be locked" in caplog.text


def test_an_object_store_has_no_locks(caplog):
    with lock(epath.Path("gs://bucket/run")):
        assert "gs://bucket/run cannot be locked" in caplog.text


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/no/.lock: No such file"):
        lock(tmp_path / "no").__enter__()
    with small_disk(kib=64) as disk:
        disk.run(["mount", "-o", "remount,ro", disk.inside])
        with pytest.raises(AssertionError, match=r"UserError: cannot write \./.lock: Read-only"):
            disk.python(PROGRAM + "lock(pathlib.Path()).__enter__()")


def test_a_full_disk_is_locked_all_the_same():
    with small_disk(kib=64) as disk:
        disk.fill()
        disk.python(PROGRAM + "with lock(pathlib.Path()): pass")
