"""A stand-in for Google Cloud Storage: one dictionary, seen through fsspec and through the HTTP interface.

`etils.epath` reaches gs:// through fsspec (gcsfs), tensorstore, which Orbax writes arrays with, through Cloud Storage's
JSON API. Here both see the same objects. As there, an object is written once and whole, cannot grow, and folders are
no more than a part of its name.
"""

import http.server
import io
import itertools
import json
import threading
import urllib.parse

from fsspec import AbstractFileSystem


class Store:
    """Objects by "bucket/name", each with the generation in which it was written."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.lock = threading.Lock()
        self._generations = itertools.count(1)

    def put(self, name: str, content: bytes) -> int:
        with self.lock:
            self.objects[name] = bytes(content), next(self._generations)
            return self.objects[name][1]

    def names(self, prefix: str) -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))


class _Upload(io.BytesIO):
    def __init__(self, store, name):
        super().__init__()
        self._store, self._name = store, name

    def close(self):
        if not self.closed:
            self._store.put(self._name, self.getvalue())
        super().close()


class Bucket(AbstractFileSystem):
    """fsspec's view."""

    protocol = ("gs", "gcs")
    cachable = False
    store: Store

    def __init__(self, *_, **__):
        super().__init__()

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if path in self.store.objects:
            found = [path]
        else:
            below = [name[len(path) + 1 :] for name in self.store.names(f"{path}/")]
            if not below:
                raise FileNotFoundError(path)
            found = sorted({f"{path}/{name.split('/')[0]}" for name in below})
        return [self.info(name) for name in found] if detail else found

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if path in self.store.objects:
            return {"name": path, "size": len(self.store.objects[path][0]), "type": "file"}
        if self.store.names(f"{path}/"):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def _open(self, path, mode="rb", **_):
        if mode == "wb":
            return _Upload(self.store, path)
        if mode != "rb":
            raise NotImplementedError(f"objects cannot be opened with mode {mode}")
        if path not in self.store.objects:
            raise FileNotFoundError(path)
        return io.BytesIO(self.store.objects[path][0])

    def rm_file(self, path):
        del self.store.objects[self._strip_protocol(path)]

    def rm(self, path, recursive=False, **_):
        path = self._strip_protocol(path)
        for name in [path, *(self.store.names(f"{path}/") if recursive else ())]:
            self.store.objects.pop(name, None)

    def cp_file(self, path1, path2, **_):
        self.store.put(self._strip_protocol(path2), self.store.objects[self._strip_protocol(path1)][0])

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    """As much of the JSON API as tensorstore asks for."""

    protocol_version = "HTTP/1.1"
    store: Store

    def _answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _json(self, **content):
        self._answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def _request(self):
        url = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        parts = url.path.removeprefix("/upload").removeprefix("/storage/v1/b/").split("/")
        name = urllib.parse.unquote("/".join(parts[2:]))
        return parts[0], name, query

    def _stale(self, name, query):
        """Whether the request is meant for another generation of the object than the one there."""
        if "ifGenerationMatch" not in query:
            return False
        there = self.store.objects.get(name, (b"", 0))[1]
        return there != int(query["ifGenerationMatch"])

    def do_GET(self):
        bucket, name, query = self._request()
        if not name:
            found = [item[len(bucket) + 1 :] for item in self.store.names(f"{bucket}/{query.get('prefix', '')}")]
            first, last = query.get("startOffset", ""), query.get("endOffset")
            found = [item for item in found if item >= first and (last is None or item < last)]
            return self._json(items=[{"name": item, "size": self._size(bucket, item)} for item in found])
        if f"{bucket}/{name}" not in self.store.objects:
            return self._answer(404)
        content, generation = self.store.objects[f"{bucket}/{name}"]
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        headers = {"x_goog_generation": str(generation)}
        if "Range" not in self.headers:
            return self._answer(200, content, **headers)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start = int(first) if first else len(content) - int(last)
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return self._answer(206, content[start:end], **headers)

    def _size(self, bucket, name):
        return str(len(self.store.objects[f"{bucket}/{name}"][0]))

    def do_POST(self):
        bucket, _, query = self._request()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = f"{bucket}/{query['name']}"
        if self._stale(name, query):
            return self._answer(412)
        return self._json(name=query["name"], bucket=bucket, generation=str(self.store.put(name, content)))

    def do_DELETE(self):
        bucket, name, query = self._request()
        if self._stale(f"{bucket}/{name}", query):
            return self._answer(412)
        return self._answer(204 if self.store.objects.pop(f"{bucket}/{name}", None) else 404)

    def log_message(self, *_):
        pass


def serve(store: Store) -> http.server.ThreadingHTTPServer:
    """The HTTP view, being served; `shutdown` ends it."""
    handler = type("Handler", (_Handler,), {"store": store})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
