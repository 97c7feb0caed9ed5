"""Where the archive of a pinned package is: in the places that pip is set up to look in, found
without pip installing anything.

pip has no command that fetches a source archive and runs nothing: to learn the name of what it
downloads it runs the package's setup.py, and before that installs whatever this asks for. So pip is
asked for its settings alone (`pip config list`: index, further indexes, folders of archives,
certificate, proxy), and the pages are read here: PEP 503 in HTML, PEP 691 in JSON, or a folder.
Without pip, or without settings of its own, the place is PyPI.

The archive is accepted by its sha256 alone, so a page need not be trusted. Name and password in an
index's address go to that host only, and into no message. (pip's netrc and keyring are not asked.)
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import ssl
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

PYPI = "https://pypi.org/simple"
SECTIONS = (":env:", "download", "install", "global")  # where pip's download looks, first wins
PAGES = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
TIMEOUT_SECONDS = 15
LARGEST_BYTES = 1 << 26  # of a page or an archive; those that are asked for have a few megabytes


def settings(listed: str) -> dict[str, str]:
    """pip's settings by name, from what `pip config list` prints: one section.name='value' a
    line.
    """
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in found and value:
            found[section][option] = str(ast.literal_eval(value))
    merged: dict[str, str] = {}
    for section in reversed(SECTIONS):
        merged |= found[section]
    return merged


@dataclass(frozen=True)
class Link:
    """A file that a page offers; sha256 if the page says it."""

    url: str
    sha256: str | None

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.url).path).rpartition("/")[2]


class Index:
    """The places of `settings`, and how to read from them."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self.folders = settings.get("find-links", "").split()
        self.indexes = [
            settings.get("index-url", PYPI),
            *settings.get("extra-index-url", "").split(),
        ]
        if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
            self.indexes = []
        self._credentials: dict[str, str] = {}
        for url in (*self.folders, *self.indexes):
            parts = urlsplit(url)
            if parts.username is not None:
                pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
                host = parts.netloc.rpartition("@")[2]
                self._credentials[host] = "Basic " + base64.b64encode(pair.encode()).decode()
        context = ssl.create_default_context(cafile=settings.get("cert"))
        handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
        if proxy := settings.get("proxy"):
            handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
        self._opener = urllib.request.build_opener(*handlers)

    def archive(self, requirement: str, sha256: str) -> tuple[str, bytes]:
        """Name and content of the archive of `requirement` (name==version) with this sha256.

        Raises ConnectionError that says for each place why it is not there.
        """
        project, _, version = requirement.partition("==")
        beginning = f"{_normal(project)}-{_normal(version)}-"
        reasons = []
        for place in self._places(_normal(project)):
            try:
                links = [k for k in self.links(place) if _normal(k.name).startswith(beginning)]
                for link in links:
                    if link.sha256 not in (None, sha256):
                        continue
                    content = self.read(link.url)
                    if hashlib.sha256(content).hexdigest() == sha256:
                        return link.name, content
            except (OSError, HTTPException) as error:
                reasons.append(f"{without_credentials(place)}: {getattr(error, 'reason', error)}")
                continue
            offered = ", ".join(link.name for link in links) or "nothing"
            reasons.append(
                f"{without_credentials(place)}: has {offered} of {requirement}, not the file with "
                f"sha256 {sha256}"
            )
        if not reasons:
            reasons.append("pip is set up to look nowhere (no-index)")
        raise ConnectionError(f"{requirement} could not be fetched\n" + "\n".join(reasons))

    def _places(self, project: str) -> Iterator[str]:
        yield from self.folders
        for index in self.indexes:
            yield f"{index.rstrip('/')}/{project}/"

    def links(self, place: str) -> list[Link]:
        """What a folder, or the page of an address, offers. Raises OSError if it can't be read."""
        folder = _local(place)
        if folder is not None and folder.is_dir() and not (folder / "index.html").exists():
            return [Link(file.absolute().as_uri(), None) for file in sorted(folder.iterdir())]
        if folder is not None:
            page = folder / "index.html" if folder.is_dir() else folder
            return _of_html(page.absolute().as_uri(), page.read_bytes())
        request = self._request(place)
        request.add_header("Accept", PAGES)
        with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            content = response.read(LARGEST_BYTES)
            if "json" in response.headers.get_content_type():
                return _of_json(response.url, content)
            return _of_html(response.url, content)

    def read(self, url: str) -> bytes:
        """The content of an address. Raises OSError."""
        with self._opener.open(self._request(url), timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read(LARGEST_BYTES)
        return content

    def _request(self, url: str) -> urllib.request.Request:
        url = without_credentials(url)
        request = urllib.request.Request(url)
        if pair := self._credentials.get(urlsplit(url).netloc):
            request.add_unredirected_header("Authorization", pair)  # nor to where it is sent on
        return request


def without_credentials(url: str) -> str:
    """An address as it may be shown."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _normal(name: str) -> str:
    """A name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _local(place: str) -> Path | None:
    """The path of a folder or a file:// address; None for one of a network."""
    parts = urlsplit(place)
    if parts.scheme in ("http", "https"):
        return None
    return Path(urllib.request.url2pathname(parts.path)) if parts.scheme == "file" else Path(place)


def _of_json(base: str, page: bytes) -> list[Link]:
    try:
        files = json.loads(page)["files"]
        return [Link(urljoin(base, f["url"]), f.get("hashes", {}).get("sha256")) for f in files]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"not a page of a package index ({error})") from error


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _of_html(base: str, page: bytes) -> list[Link]:
    parser = _Anchors()
    parser.feed(page.decode("utf-8", "replace"))
    links = []
    for target in parser.targets:
        url, fragment = urldefrag(urljoin(base, target))
        links.append(Link(url, fragment.removeprefix("sha256=") if "sha256=" in fragment else None))
    return links
