"""An object store on this machine that speaks as much of Google Cloud Storage's JSON API as we use.

    with fake_gcs() as store:
        subprocess.run([...], env=os.environ | store.environ)  # works in gs://bucket/…
        assert "run/config.json" in store.objects

fsspec's gcsfs and TensorStore's driver "gcs" are led there by the environment.
As in the store itself an object appears whole or not at all, cannot be appended to, and folders are
only the beginnings of names.
"""

import base64
import contextlib
import dataclasses
import email
import http.server
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import google_crc32c

_LIST = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o")
_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)")
_UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/(?P<bucket>[^/]+)/o")
_COPY = re.compile(
    r"/storage/v1/b/[^/]+/o/(?P<source>[^/]+)/(?:rewriteTo|copyTo)/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)"
)
_MOVE = re.compile(r"/storage/v1/b/[^/]+/o/(?P<source>[^/]+)/moveTo/o/(?P<name>[^/]+)")
_BUCKET = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)")


@dataclasses.dataclass
class Store:
    """The one bucket's objects, and what leads clients to them.

    Attributes:
      objects: each object's bytes.
      generations: each object's number, which a new content raises.
      begun: the bytes of uploads that come in parts.
      requests: method and path of each request that came.
      on_put: called with each new object's name, before its writer is told that it is there.
    """

    port: int
    objects: dict[str, bytes] = dataclasses.field(default_factory=dict)
    generations: dict[str, int] = dataclasses.field(default_factory=dict)
    begun: dict[str, bytes] = dataclasses.field(default_factory=dict)
    requests: list[str] = dataclasses.field(default_factory=list)
    on_put: Callable[[str], Any] = lambda name: None
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables of a process that works in this store."""
        url = f"http://127.0.0.1:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GS_TOKEN": "anon",
            "EPATH_USE_TF": "false",
            "no_proxy": "127.0.0.1",
        }

    def put(self, name: str, data: bytes) -> dict[str, Any]:
        """Keeps an object; returns what the store says of it."""
        self.objects[name] = data
        self.generations[name] = 1 + max(self.generations.values(), default=0)
        self.on_put(name)
        return self.about(name)

    def about(self, name: str) -> dict[str, Any]:
        """What the store says of an object."""
        data = self.objects[name]
        crc = google_crc32c.value(data).to_bytes(4, "big")
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(data)),
            "generation": str(self.generations[name]),
            "metageneration": "1",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "contentType": "application/octet-stream",
            "crc32c": base64.b64encode(crc).decode(),
        }


@contextlib.contextmanager
def fake_gcs() -> Iterator[Store]:
    """Serves gs://bucket until the end of the block."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.store = Store(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    store: Store

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may end at any time
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else b""
        body = body or self.rfile.read(length)
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        store = self.server.store
        with store.lock:
            store.requests.append(f"{self.command} {self.path}")
            code, content, headers = self._answer(url.path, query, body)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle  # noqa: N815

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any, dict]:
        store = self.server.store
        copy, move = _COPY.fullmatch(path), _MOVE.fullmatch(path)
        if match := copy or move:
            source, name = (urllib.parse.unquote(match[x]) for x in ("source", "name"))
            if source not in store.objects:
                return _error(404, f"no object {source}")
            about = store.put(name, store.objects[source])
            if move:
                del store.objects[source]
                return 200, about, {}
            return 200, {"kind": "storage#rewriteResponse", "done": True, "resource": about}, {}
        if match := _UPLOAD.fullmatch(path):
            return self._upload(query, body)
        if match := _OBJECT.fullmatch(path):
            return self._object(urllib.parse.unquote(match["name"]), query)
        if _LIST.fullmatch(path):
            return self._list(query)
        if match := _BUCKET.fullmatch(path):
            if match["bucket"] != "bucket":
                return _error(404, f"no bucket {match['bucket']}")
            return 200, {"kind": "storage#bucket", "name": "bucket", "id": "bucket"}, {}
        return _error(404, f"nothing at {path}")

    def _refused(self, name: str, query: dict[str, str]) -> tuple[int, Any, dict] | None:
        """What is answered where a condition on the object's generation does not hold."""
        generation = str(self.server.store.generations.get(name, 0))
        if generation == "0" or name not in self.server.store.objects:
            generation = "0"
        if query.get("ifGenerationMatch", generation) != generation:
            return _error(412, "another generation")
        if query.get("ifGenerationNotMatch") == generation:
            return _error(304, "the same generation")
        return None

    def _upload(self, query: dict[str, str], body: bytes) -> tuple[int, Any, dict]:
        store = self.server.store
        kind, name, data = query["uploadType"], query.get("name"), body
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = _parts(head, body)
            name, data = json.loads(parts[0])["name"], parts[1]
        elif kind == "resumable":
            if "upload_id" not in query:  # only its name; the data follow
                name = name or json.loads(body)["name"]
                store.begun[str(len(store.requests))] = b""
                again = {"uploadType": kind, "name": name, "upload_id": str(len(store.requests))}
                again = urllib.parse.urlencode(again)
                url = f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?{again}"
                return 200, {}, {"Location": url}
            _, _, total = self.headers.get("Content-Range", "bytes 0-0/0").partition("/")
            data = store.begun.pop(query["upload_id"]) + body
            if total == "*" or len(data) < int(total):
                store.begun[query["upload_id"]] = data
                return 308, b"", {"Range": f"bytes=0-{len(data) - 1}"}
        return self._refused(name, query) or (200, store.put(name, data), {})

    def _object(self, name: str, query: dict[str, str]) -> tuple[int, Any, dict]:
        store = self.server.store
        if name not in store.objects:
            return self._refused(name, query) or _error(404, f"no object {name}")
        if refused := self._refused(name, query):
            return refused
        if self.command == "DELETE":
            del store.objects[name]
            return 204, b"", {}
        if query.get("alt") != "media":
            return 200, store.about(name), {}
        data, about = store.objects[name], store.about(name)
        headers = {
            "Content-Type": "application/octet-stream",
            "x-goog-generation": about["generation"],
            "x-goog-hash": f"crc32c={about['crc32c']}",
            "x-goog-stored-content-length": about["size"],
        }
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else max(len(data) - int(match[2]), 0)
            last = min(int(match[2]), len(data) - 1) if match[1] and match[2] else len(data) - 1
            if first >= len(data):
                return _error(416, "beyond the end")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return 206, data[first : last + 1], headers
        return 200, data, headers

    def _list(self, query: dict[str, str]) -> tuple[int, Any, dict]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, folders = [], set()
        for name in sorted(self.server.store.objects):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or not query.get("startOffset", "") <= name:
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.server.store.about(name))
        return 200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}, {}


def _parts(head: bytes, body: bytes) -> list[bytes]:
    """The parts of a multipart message, as they are."""
    boundary = email.message_from_bytes(head).get_boundary()
    parts = (b"\n" + body.replace(b"\r\n--", b"\n--")).split(f"\n--{boundary}".encode())[1:-1]
    return [re.split(rb"\r?\n\r?\n", part.lstrip(b"\r\n"), maxsplit=1)[1] for part in parts]


def _error(code: int, message: str) -> tuple[int, Any, dict]:
    if code == 304:
        return code, b"", {}
    return code, {"error": {"code": code, "message": message, "errors": [{"message": message}]}}, {}
