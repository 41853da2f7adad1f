"""Downloads from servers good and bad."""

import http.server
import socket
import threading
import time

import numpy as np
import pytest

from gnp.data import download
from gnp.data.download import is_reachable
from gnp.errors import UserError
from tests.data.fake_archives import archive_of, message_of, tree
from tests.data.faulty_server import serving

CONTENT = np.random.default_rng(0).bytes(262_144)


@pytest.fixture
def server():
    with serving(CONTENT) as server:
        yield server


def fetch(server, folder):
    return download.fetch(archive_of(CONTENT, url=server.url), folder)


def test_fetches_a_file_once(server, tmp_path):
    for _ in range(2):
        path = fetch(server, tmp_path)
        assert tree(tmp_path) == {"data.zip": CONTENT}
        assert path == tmp_path / "data.zip"
    assert server.ranges == [None]


@pytest.mark.parametrize(
    ("fault", "have"), [("", 100_000), ("no ranges", 100_000), ("", 262_144), ("", 400_000)]
)
def test_goes_on_with_a_part(server, tmp_path, fault, have):
    server.fault = fault
    (tmp_path / "data.zip.part").write_bytes((CONTENT * 2)[:have])
    fetch(server, tmp_path)
    assert tree(tmp_path) == {"data.zip": CONTENT}
    assert server.ranges == {100_000: ["bytes=100000-"], 262_144: [], 400_000: [None]}[have]


@pytest.mark.parametrize("fault", ["cut", "no length"])
def test_a_connection_that_breaks_off_is_gone_on_with(server, tmp_path, fault):
    server.fault = fault
    message = message_of(fetch, server, tmp_path)
    assert "broke off after 131,072 of 262,144 bytes" in message
    assert "run this again to go on" in message
    assert tree(tmp_path) == {"data.zip.part": CONTENT[:131_072]}
    server.fault = ""
    fetch(server, tmp_path)
    assert tree(tmp_path) == {"data.zip": CONTENT}
    assert server.ranges == [None, "bytes=131072-"]


def test_a_server_that_stalls_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_READ_SECONDS", 0.3)
    server.fault = "stalls"
    start = time.monotonic()
    assert "broke off after 131,072 of 262,144 bytes" in message_of(fetch, server, tmp_path)
    assert time.monotonic() - start < 5
    assert tree(tmp_path) == {"data.zip.part": CONTENT[:131_072]}


@pytest.mark.parametrize(
    ("fault", "reason", "left"),
    [
        ("garbage", "has the MD5 sum", {}),
        ("endless", "has 27[0-9],[0-9]{3} bytes in place of 262,144", {}),
        ("another file", "has 26 bytes, but data.zip 262,144", {}),
        ("refuses", "answers 503", {}),
        ("no HTTP", "broke off after 0 of 262,144", {}),
    ],
)
def test_a_wrong_file_is_not_kept(server, tmp_path, fault, reason, left):
    server.fault = fault
    with pytest.raises(UserError, match=reason):
        fetch(server, tmp_path)
    assert tree(tmp_path) == left
    server.fault = ""
    fetch(server, tmp_path)
    assert tree(tmp_path) == {"data.zip": CONTENT}


@pytest.mark.parametrize("fault", ["refuses", "another file", "no HTTP"])
def test_a_part_survives_a_server_that_is_out_of_order(server, tmp_path, fault):
    (tmp_path / "data.zip.part").write_bytes(CONTENT[:1000])
    server.fault = fault if fault != "another file" else ""
    if fault == "another file":
        server.content = b"<html>please log in</html>" * 100
    message_of(fetch, server, tmp_path)
    assert tree(tmp_path) == {"data.zip.part": CONTENT[:1000]}


def test_a_part_of_another_file_is_found_out(server, tmp_path):
    (tmp_path / "data.zip.part").write_bytes(bytes(1000))
    assert "has the MD5 sum" in message_of(fetch, server, tmp_path)
    fetch(server, tmp_path)
    assert tree(tmp_path) == {"data.zip": CONTENT}


def test_a_server_that_goes_on_elsewhere_is_asked_anew(server, tmp_path):
    (tmp_path / "data.zip.part").write_bytes(CONTENT[:1000])
    server.fault = "another range"
    # It begins at 0, from which the file can be written as well.
    fetch(server, tmp_path)
    assert tree(tmp_path) == {"data.zip": CONTENT}


def test_a_file_at_hand_is_checked_and_not_removed(server, tmp_path):
    path = tmp_path / "data.zip"
    for content in (CONTENT[:-1], bytes(len(CONTENT))):
        path.write_bytes(content)
        message = message_of(fetch, server, tmp_path)
        assert f"{path} is not the genuine file" in message
        assert "remove it" in message
        assert path.read_bytes() == content
    assert server.ranges == []


def test_without_a_network_says_what_to_fetch(tmp_path):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/data.zip"
        message = message_of(download.fetch, archive_of(CONTENT, url=url), tmp_path)
    assert url in message
    assert f"put it into {tmp_path}" in message


def test_a_full_disk_is_told(server, tmp_path):
    (tmp_path / "data.zip.part").symlink_to("/dev/full")
    message = message_of(fetch, server, tmp_path)
    assert "No space left on device" in message
    assert "data.zip.part" in message


def test_reachable_is_what_answers(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{server.server_port}/archive"
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert is_reachable(url)
    thread.join()
    # The port is still bound, but nobody answers any more.
    start = time.monotonic()
    assert not is_reachable(url, seconds=0.2)
    assert time.monotonic() - start < 2
    server.server_close()
    assert not is_reachable(url)


def test_slow_name_look_up_is_not_waited_for(monkeypatch):
    released = threading.Event()

    def look_up(*_):
        released.wait(30)
        raise socket.gaierror

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    start = time.monotonic()
    assert not is_reachable("http://slow.invalid/archive", seconds=0.2)
    assert time.monotonic() - start < 2
    released.set()
