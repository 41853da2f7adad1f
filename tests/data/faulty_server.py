"""A web server that has one file, and faults."""

import contextlib
import http.server
import threading
from collections.abc import Iterator

import pytest


class Server(http.server.ThreadingHTTPServer):
    """The server, which answers on a port of its own.

    Attributes:
      content: the file.
      fault: what it does wrong.
      ranges: of each GET, the header Range or None.
    """

    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.fault, self.ranges = content, "", []
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/data.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        content, fault, asked = self.server.content, self.server.fault, self.headers["Range"]
        self.server.ranges.append(asked)
        if fault == "no HTTP":
            self.wfile.write(b"\x00\xff" * 100)
            return
        if fault == "refuses":
            self.send_error(503)
            return
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if asked and first >= len(content):
            self.send_error(416)
            return
        if asked and fault != "no ranges":
            self.send_response(206)
            start = 0 if fault == "another range" else first
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            content = content[start:]
        else:
            self.send_response(200)
        if fault == "garbage":
            content = bytes(len(content))
        if fault == "another file":
            content = b"<html>please log in</html>"
        if fault == "endless":
            content = content * 3
        if fault not in ("no length", "endless"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault in ("cut", "no length"):
            content = content[: len(content) // 2]
        if fault == "stalls":
            self.wfile.write(content[: len(content) // 2])
            self.server.released.wait(20)
            return
        self.wfile.write(content)


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[Server]:
    """Runs a server in a thread."""
    with pytest.MonkeyPatch.context() as patch, Server(content) as server:
        patch.setenv("NO_PROXY", "*")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
