"""A stand-in for the part of GitHub's and GitLab's APIs that comments on a pull request need. It is neither's code."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

TOKEN = "a token of the forge"
BOT = {"login": "github-actions[bot]", "type": "Bot"}
LONGEST = 65_536


class Forge:
    """The comments of the pull request 7 of owner/name, or of the merge request 7 of GitLab's project 5."""

    def __init__(self) -> None:
        self.comments: list[dict[str, Any]] = []
        self.user: str | None = None
        """Whose the token is; none: of a job of GitHub."""
        self.writable = True
        self.url = ""

    @property
    def bodies(self) -> list[str]:
        return [comment["body"] for comment in self.comments]

    def add(self, body: str, author: dict[str, str]) -> None:
        number = 100 + len(self.comments)
        self.comments.append({"id": number, "body": body, "user": author, "author": author})

    def answer(self, method: str, url: str, token: str | None, sent: dict[str, Any]) -> tuple[int, Any]:
        """Answer as the documentation of the two says."""
        path, query = urlparse(url).path, parse_qs(urlparse(url).query)
        if token != TOKEN:
            return 401, {"message": "Bad credentials"}
        if path == "/user":
            named = {"login": self.user, "username": self.user}
            return (200, named) if self.user else (403, {"message": "Resource not accessible by integration"})
        if method == "GET" and path in ("/repos/owner/name/issues/7/comments", "/projects/5/merge_requests/7/notes"):
            page, size = int(query.get("page", ["1"])[0]), int(query.get("per_page", ["30"])[0])
            return 200, self.comments[(page - 1) * size : page * size]
        if not self.writable:
            return 403, {"message": "Resource not accessible by integration"}
        if len(sent.get("body", "")) > LONGEST:
            return 422, {"message": "body is too long (maximum is 65536 characters)"}
        if method == "POST" and path in ("/repos/owner/name/issues/7/comments", "/projects/5/merge_requests/7/notes"):
            self.add(sent["body"], {"username": self.user} if self.user else BOT)
            return 201, self.comments[-1]
        known = r"/repos/owner/name/issues/comments/(\d+)" if method == "PATCH" else r"/projects/5/merge_requests/7/notes/(\d+)"
        if method in ("PATCH", "PUT") and (number := re.fullmatch(known, path)):
            changed = next(comment for comment in self.comments if comment["id"] == int(number[1]))
            changed["body"] = sent["body"]
            return 200, changed
        return 404, {"message": "Not Found"}


@contextmanager
def running_forge() -> Iterator[Forge]:
    """Serve one on a port of this machine."""
    forge = Forge()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("PRIVATE-TOKEN") or str(self.headers.get("Authorization", "")).removeprefix("Bearer ")
            status, content = forge.answer(self.command, self.path, token, json.loads(sent or "{}"))
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PATCH = do_PUT = _serve  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    forge.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield forge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
