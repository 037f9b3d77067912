"""A stand-in for the dataset side of the hub on this machine's loopback: what the real client asks for, and no more."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from loopback import LocalHub, QuietHandler

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
MISSING = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class DataHub(LocalHub):
    """Datasets by hub id, each a folder; `converted` are the folders of the branch with Parquet copies."""

    datasets: dict[str, Path]
    converted: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def handler(self) -> type[QuietHandler]:
        return _Handler

    def folder(self, hub_id: str, revision: str) -> tuple[Path | None, str]:
        if revision in (OTHER_COMMIT, "refs/convert/parquet"):
            return self.converted.get(hub_id), OTHER_COMMIT
        return (self.datasets.get(hub_id) if revision in ("main", COMMIT) else None), COMMIT


class _Handler(QuietHandler):
    served: DataHub

    def do_POST(self) -> None:
        self._send(body=True)

    def _send(self, *, body: bool) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.served.asked.append(f"{self.command} {unquote(path)}")
        status, headers, content = self._answer([unquote(part) for part in path.strip("/").split("/")], sent)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _answer(self, parts: list[str], sent: bytes) -> Answer:
        api = parts[:2] == ["api", "datasets"]
        if not api and parts[0] != "datasets":
            return 404, MISSING, b"{}"
        rest = parts[2 if api else 1 :]
        hub_id, action, revision = "/".join(rest[:2]), *(rest[2:4] if len(rest) > 3 else ["", "main"])
        if hub_id not in self.served.datasets:
            return 404, MISSING, b"{}"
        folder, commit = self.served.folder(hub_id, revision)
        if folder is None:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}, b"{}"
        if not api:
            return self._file(hub_id, folder, commit, "/".join(rest[4:]))
        if action == "tree":
            return _json(_tree(folder, "/".join(rest[4:]), "recursive=true" in self.path.lower()))
        if action == "paths-info":
            return _json(_facts_of(folder, sent))
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        facts = {
            "_id": "1", "id": hub_id, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0,
            "gated": "manual" if hub_id in self.served.gated else False, "siblings": [{"rfilename": name} for name in names],
        }  # fmt: skip
        return _json(facts)

    def _file(self, hub_id: str, folder: Path, commit: str, name: str) -> Answer:
        if hub_id in self.served.gated:
            said = f"Access to dataset {hub_id} is restricted. You must be authenticated to access it."
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": said}, b""
        file = folder / name
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit}, file.read_bytes()


def _json(content: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _tree(folder: Path, under: str, deep: bool) -> list[dict[str, Any]]:
    inside = folder / under
    entries = sorted(inside.rglob("*") if deep else inside.iterdir()) if inside.is_dir() else []
    return [_facts(folder, entry) for entry in entries]


def _facts(folder: Path, entry: Path) -> dict[str, Any]:
    path = entry.relative_to(folder).as_posix()
    if entry.is_dir():
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return {"type": "file", "path": path, "size": entry.stat().st_size, "oid": _etag(entry)}


def _facts_of(folder: Path, sent: bytes) -> list[dict[str, Any]]:
    """What is asked for by path in a form or in JSON; paths that are not there are left out, as on the real hub."""
    from urllib.parse import parse_qs

    text = sent.decode()
    paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
    return [_facts(folder, folder / path) for path in paths if path and (folder / path).exists()]


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
