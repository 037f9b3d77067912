"""A stand-in for the model hub on this machine's loopback: what the real client needs to fetch a model, and no more."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from loopback import LocalHub, QuietHandler

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub(LocalHub):
    """Models by hub id, each a folder; ids in `gated` show their file list but not their files, as on the real hub."""

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def handler(self) -> type[QuietHandler]:
        return _Handler


class _Handler(QuietHandler):
    served: Hub

    def _send(self, *, body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        self.served.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            status, headers, content = self._listing("/".join(parts[2:4]), parts[4:])
        else:
            status, headers, content = self._file("/".join(parts[:2]), parts[2:])
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _listing(self, hub_id: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        folder = self.served.models.get(hub_id)
        if folder is None:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {rest[1]}"}, b"{}"
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)} for file in files]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        facts = {
            "_id": "1", "id": hub_id, "modelId": hub_id, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0,
            "gated": "manual" if hub_id in self.served.gated else False, "siblings": [{"rfilename": file.name} for file in files],
        }  # fmt: skip
        return 200, {"Content-Type": "application/json"}, json.dumps(facts).encode()

    def _file(self, hub_id: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        folder = self.served.models.get(hub_id)
        if folder is None or rest[:1] != ["resolve"] or len(rest) != 3:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        if hub_id in self.served.gated:
            said = f"Access to model {hub_id} is restricted. You must be authenticated to access it."
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": said}, b""
        file = folder / rest[2]
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        return 200, {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT}, file.read_bytes()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def one_layer(source: Path, folder: Path) -> Path:
    """The first layer of a small Llama with all else it has: quick enough for a thousand steps."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), encoding="utf-8")
    weights = load_file(source / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody may fetch")
    return folder
