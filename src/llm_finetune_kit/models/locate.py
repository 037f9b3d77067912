"""From a model's name to a folder on this disk. Needs no torch, so a wrong name is told at once."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from llm_finetune_kit.catalog import DEMO, MODELS, SHORT_NAMES
from llm_finetune_kit.errors import MachineError, ModelError, nearest

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
NOT_WANTED = ["onnx/*", "original/*", "consolidated*", "openvino/*", "coreml/*"]


@dataclass(frozen=True)
class Located:
    """A model's files. `name` is a hub id, `demo` or the folder as the user gave it."""

    name: str
    folder: Path

    @property
    def loadable(self) -> str:
        """What adapter_config.json records, so that plain PEFT finds the base: the hub id or the folder."""
        local = self.name == DEMO or Path(self.name).is_dir()
        return str(self.folder.resolve()) if local else self.name


def is_demo(name: str) -> bool:
    return SHORT_NAMES.get(name.lower(), name.lower()) == DEMO


def demo_folder() -> Path:
    """The embedded model's folder inside the package."""
    return Path(str(files("llm_finetune_kit") / "assets" / "demo"))


def check_name(name: str) -> str:
    """The hub id or local folder that a name stands for; no network is used. Raises ModelError if neither."""
    if Path(name).is_dir():
        return name
    lower = name.lower()
    known = MODELS.get(SHORT_NAMES.get(lower, lower))
    if known is not None:
        return DEMO if lower == DEMO else known.hub_id
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise ModelError(1, f"no model folder {name}", where="model.name", fix="name a folder that holds config.json")
    if "/" not in name:
        near = nearest(lower, [*MODELS, *SHORT_NAMES], 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ModelError(
            1,
            f"no model is called {name}",
            where="model.name",
            fix=f"{hint}`finetune models` lists short names; a hub id has the form owner/name",
        )
    return name


def locate(name: str, *, revision: str | None = None, cache_dir: str | None = None) -> Located:
    """The folder with the model's files, downloaded from the hub if they are not on this disk yet.

    Raises ModelError for a name that cannot be and MachineError where the hub cannot be reached.
    """
    target = check_name(name)
    if target == DEMO:
        return Located(DEMO, demo_folder())
    if Path(target).is_dir():
        return Located(name, _checked_folder(Path(target)))
    return Located(target, _checked_folder(_download(target, revision, cache_dir)))


def _download(hub_id: str, revision: str | None, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    asked = {"revision": revision, "cache_dir": cache_dir, "allow_patterns": WANTED, "ignore_patterns": NOT_WANTED}
    try:
        return Path(snapshot_download(hub_id, **asked))
    except GatedRepoError:
        raise ModelError(
            3, f"{hub_id} is gated", where="model.name", fix=f"accept its licence on the hub page of {hub_id} and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            2, f"the hub has no model {hub_id}", where="model.name", fix="check the spelling; private models need HF_TOKEN"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MachineError(
            1,
            f"{hub_id} is not on this machine and the hub cannot be reached",
            where="model.name",
            why=str(error).splitlines()[0][:200],
            fix="connect once to download it, give a local folder, or use the embedded model: --model demo",
        ) from None


def _checked_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return folder
    held = sorted(path.name for path in folder.iterdir())[:8]
    raise ModelError(
        4,
        "holds no config.json",
        where=str(folder),
        why=f"it holds {', '.join(held) or 'nothing'}",
        fix="name the folder above or below",
    )
