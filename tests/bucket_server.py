"""A stand-in for Google Cloud Storage of the tests' own: the part of its JSON interface that gcsfs and TensorStore use,
with generations and their preconditions, over objects in the memory of a process of its own.

Facts: cloud.google.com/storage/docs/json_api (objects: list, get, insert, delete, rewrite; resumable uploads).
"""

import base64
import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NOBODY = "127.0.0.1:1"
OBJECT = re.compile(r"/(?:upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?")
CREATED = "2026-01-01T00:00:00Z"


class BucketServer:
    """Runs while it is entered. `lock` makes it refuse everybody until `unlock`; its objects stay."""

    def __enter__(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen([sys.executable, __file__, str(port)])
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{self._url}/storage/v1/b/bucket", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("the stand-in for a bucket did not start")

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait(20)

    @property
    def environment(self) -> dict[str, str]:
        """What sends gcsfs and TensorStore here, and lets neither look for the metadata server of Google Cloud."""
        return {
            "STORAGE_EMULATOR_HOST": self._url,
            "TENSORSTORE_GCS_HTTP_URL": self._url,
            "GCE_METADATA_HOST": NOBODY,
            "GCE_METADATA_ROOT": NOBODY,
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def lock(self):
        self._say("lock")

    def unlock(self):
        self._say("unlock")

    def _say(self, word):
        urllib.request.urlopen(urllib.request.Request(f"{self._url}/{word}", method="POST"), timeout=5).close()


class Objects:
    """name -> (generation, bytes), of one bucket."""

    def __init__(self):
        self.lock, self.locked = threading.Lock(), False
        self.stored: dict[str, tuple[int, bytes]] = {}
        self.uploads: dict[str, tuple[str, dict]] = {}
        self.generations, self.sessions = itertools.count(1), itertools.count(1)

    def described(self, name: str) -> dict:
        import google_crc32c

        generation, data = self.stored[name]
        return {
            "kind": "storage#object", "id": f"bucket/{name}/{generation}", "name": name, "bucket": "bucket",
            "generation": str(generation), "metageneration": "1", "size": str(len(data)), "timeCreated": CREATED,
            "updated": CREATED, "contentType": "application/octet-stream", "storageClass": "STANDARD",
            "crc32c": base64.b64encode(google_crc32c.Checksum(data).digest()).decode(),
        }  # fmt: skip

    def refused(self, name: str, asked: dict[str, str]) -> int:
        """The status that a precondition which does not hold makes of a request; 0 where all hold."""
        now = self.stored[name][0] if name in self.stored else 0
        if "ifGenerationMatch" in asked and int(asked["ifGenerationMatch"]) != now:
            return 412
        if "ifGenerationNotMatch" in asked and int(asked["ifGenerationNotMatch"]) == now:
            return 304
        return 0

    def put(self, name: str, data: bytes, asked: dict[str, str]) -> tuple[int, dict]:
        with self.lock:
            status = self.refused(name, asked)
            if status:
                return 412, error(412)
            self.stored[name] = next(self.generations), data
            return 200, self.described(name)

    def delete(self, name: str, asked: dict[str, str]) -> int:
        with self.lock:
            if name not in self.stored:
                return 404
            if self.refused(name, asked):
                return 412
            del self.stored[name]
            return 204

    def listed(self, asked: dict[str, str]) -> dict:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        first, end = asked.get("startOffset", ""), asked.get("endOffset")
        items, prefixes = [], set()
        with self.lock:
            for name in sorted(self.stored):
                if not name.startswith(prefix) or name < first or (end and name >= end):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self.described(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


def error(status: int) -> dict:
    return {"error": {"code": status, "message": f"status {status}"}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True
    objects = Objects()

    def log_message(self, *args):
        pass

    def answer(self, status: int, body=b"", headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name == "Content-Type" for name, _ in headers):
            self.send_header("Content-Type", "application/json" if not isinstance(body, bytes) else "text/plain")
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(data)

    def read(self) -> tuple[str, str | None, dict[str, str], bytes]:
        """(path, object's name, query, body)"""
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        found = OBJECT.fullmatch(url.path)
        name = unquote(found[2]) if found and found[2] else None
        return url.path, name, {k: v[0] for k, v in parse_qs(url.query).items()}, body

    def handle_one(self):
        path, name, asked, body = self.read()
        if path in ("/lock", "/unlock"):
            self.objects.locked = path == "/lock"
            return self.answer(200)
        if self.objects.locked:
            return self.answer(403, error(403))
        found = OBJECT.fullmatch(path)
        if not found or unquote(found[1]) != "bucket":
            return self.answer(404, error(404))
        if path.startswith("/upload/"):
            return self.upload(asked, body)
        method = self.command
        if method == "DELETE":
            return self.answer(self.objects.delete(name, asked))
        if method == "POST":
            return self.rewrite(name, asked)
        if "/o" not in path.removeprefix("/storage/v1/b/bucket"):
            return self.answer(200, {"kind": "storage#bucket", "name": "bucket"})
        return self.get(name, asked) if name is not None else self.answer(200, self.objects.listed(asked))

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_one

    def get(self, name: str, asked: dict[str, str]):
        with self.objects.lock:
            if name not in self.objects.stored:
                return self.answer(404, error(404))
            status = self.objects.refused(name, asked)
            generation, data = self.objects.stored[name]
            described = self.objects.described(name)
        if status:
            return self.answer(status, error(status))
        if asked.get("alt") != "media":
            return self.answer(200, described)
        headers = [("x-goog-generation", str(generation)), ("Content-Type", "application/octet-stream")]
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(200, data, headers)
        if not wanted[1]:
            start, end = max(0, len(data) - int(wanted[2])), len(data)
        else:
            start, end = int(wanted[1]), min(len(data), int(wanted[2] or len(data)) + 1)
        if start >= len(data):
            return self.answer(416, error(416))
        return self.answer(206, data[start:end], [*headers, ("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")])

    def upload(self, asked: dict[str, str], body: bytes):
        kind, objects = asked.get("uploadType"), self.objects
        if "upload_id" in asked:
            name, conditions, data = objects.uploads[asked["upload_id"]]
            first, last, total = re.fullmatch(
                r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers["Content-Range"]
            ).groups()
            data += body
            objects.uploads[asked["upload_id"]] = name, conditions, data
            if total == "*" or len(data) < int(total):
                return self.answer(308, b"", [("Range", f"bytes=0-{len(data) - 1}")])
            return self.answer(*objects.put(name, data, conditions))
        if kind == "media":
            return self.answer(*objects.put(asked["name"], body, asked))
        if kind == "multipart":
            mark = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])[1]
            described, data = (
                re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in body.split(b"--" + mark.encode())[1:3]
            )
            end = 2 if data.endswith(b"\r\n") else 1  # of the line before the next mark
            return self.answer(*objects.put(json.loads(described)["name"], data[:-end], asked))
        name = asked.get("name") or json.loads(body)["name"]
        session = str(next(objects.sessions))
        objects.uploads[session] = name, asked, b""
        where = f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={session}"
        return self.answer(200, {}, [("Location", where)])

    def rewrite(self, path: str, asked: dict[str, str]):
        source, target = (unquote(p) for p in re.split(r"/(?:rewriteTo|copyTo)/b/[^/]+/o/", path))
        if source not in self.objects.stored:
            return self.answer(404, error(404))
        _, described = self.objects.put(target, self.objects.stored[source][1], asked)
        return self.answer(200, {"done": True, "resource": described})


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
