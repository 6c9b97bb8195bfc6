"""A hub on this machine: the two questions that `huggingface_hub` asks about a model at a commit, over HTTP.

`GET /api/models/NAME/tree/COMMIT` lists the files, `HEAD` and `GET /NAME/resolve/COMMIT/FILE` give them, with ranges.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub(ThreadingHTTPServer):
    "Serves one folder as one model at one commit; keeps what was asked."

    daemon_threads = True

    def __init__(self, folder: Path, name: str, commit: str):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.name, self.commit = folder, name, commit
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.cut: dict[str, int] = {}  # file → how often its connection breaks half way
        self.refuse: tuple[int, str] | None = None  # a status and the hub's code for it

    @property
    def url(self) -> str:
        "Where it is."
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[str]:
        "Names of the files whose contents were sent."
        return sorted(
            {path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path}
        )


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        "Says nothing."

    def _send(self, code: int, body: bytes = b"", **headers: str):
        self.send_response(code)
        for k, v in {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub: Hub = self.server
        path = self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if hub.refuse:
            return self._send(hub.refuse[0], X_Error_Code=hub.refuse[1], X_Error_Message=f"because {hub.refuse[1]}")
        if path.startswith(f"/api/models/{hub.name}/tree/"):
            if path.rpartition("/")[2] != hub.commit:
                return self._send(404, X_Error_Code="RevisionNotFound")
            listed = [self._entry(p) for p in sorted(hub.folder.iterdir())]
            return self._send(200, json.dumps(listed).encode(), Content_Type="application/json")
        head = f"/{hub.name}/resolve/{hub.commit}/"
        file = hub.folder / path.removeprefix(head)
        if not path.startswith(head) or not file.is_file():
            return self._send(404, X_Error_Code="RepoNotFound" if hub.name not in path else "EntryNotFound")
        return self._file(file)

    do_HEAD = do_GET

    def _entry(self, path: Path) -> dict:
        body = path.read_bytes()
        return {"type": "file", "path": path.name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}

    def _file(self, path: Path):
        hub, body = self.server, path.read_bytes()
        facts = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": hub.commit, "Accept_Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            facts["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.command == "GET" and hub.cut.get(path.name, 0) > 0:
            hub.cut[path.name] -= 1
            self.send_response(206 if start else 200)
            for k, v in {
                "Content-Length": str(len(body) - start),
                **{k.replace("_", "-"): v for k, v in facts.items()},
            }.items():
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(body[start : start + (len(body) - start) // 2])
            self.close_connection = True
            return None
        return self._send(206 if start else 200, body[start:], **facts)


@contextmanager
def hub(folder: Path, name: str = "team/small", commit: str = "c0ffee" * 6 + "c0de") -> Iterator[Hub]:
    "A hub that runs."
    server = Hub(folder, name, commit)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
