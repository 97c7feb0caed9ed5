"""A server that lets wandb's runs in and forgets what they send: as much of the protocol of wandb
0.31 as starting, logging and finishing a run take.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = {"id": "E", "name": "me"}
PROJECT = {"id": "P", "name": "basis", "entity": ENTITY}


def answer(query: str, variables: dict[str, Any]) -> dict[str, Any]:
    if "UpsertBucket" in query:
        bucket = {"id": "B", "name": variables.get("name"), "displayName": "a run", "config": "{}"}
        bucket |= {"project": PROJECT, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if "RunResumeStatus" in query:
        return {"model": PROJECT | {"bucket": None}}
    if "CreateRunFiles" in query:
        return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": []}}
    return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        said: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            said = {"data": answer(asked["query"], asked.get("variables") or {})}
        content = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST


class Server(ThreadingHTTPServer):
    """One that can die: connections that are open end too."""

    daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def die(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)

    def __init__(self) -> None:
        self.connections: list[Any] = []
        super().__init__(("127.0.0.1", 0), Handler)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.die()
        thread.join()
