"""Files of tensors: what authors publish is read, what we save is whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core.checks import reject, words

FORMAT = "regard.model/1"
FILE = "model.safetensors"
# What a published folder may hold, the first that is there.
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FILES = (FILE, "pytorch_model.bin")
WRAPPERS = ("state_dict", "model", "module", "task")  # names under which trainers keep the tensors


def read_published(op: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU and under their names.

    A `.safetensors` file, a file of `torch.save` (read by its loader for weights only, which
    runs no code), or a folder that holds one, in pieces or in one.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{op}: checkpoint {place} does not exist")
    if not place.is_dir():
        return _read_file(op, place)
    for index in INDEXES:
        if (place / index).exists():
            return _read_pieces(op, place, index)
    for name in FILES:
        if (place / name).exists():
            return _read_file(op, place / name)
    accepted = f"a file, or a folder with one of {', '.join((*INDEXES, *FILES))}"
    raise reject(op, "checkpoint", accepted, words(f"the folder {place}"))


def published_config(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The `config.json` beside a published checkpoint, if `path` is a folder that has one."""
    place = Path(path) / "config.json"
    if not place.is_file():
        return None
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"create_model: {place} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"create_model: {place} must hold an object")
    return found


def _read_pieces(op: str, folder: Path, index: str) -> dict[str, Tensor]:
    try:
        places = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{op}: {folder / index} is no index of a checkpoint") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{op}: {folder / index} names {name!r}, which is not in its folder")
        if not (folder / name).exists():
            raise ValueError(f"{op}: {folder} lacks {name}, which its index names")
        tensors |= _read_file(op, folder / name)
    absent = [name for name in places if name not in tensors]
    if absent:
        raise ValueError(f"{op}: {folder} lacks {absent[0]}, which its index names")
    return tensors


def _read_file(op: str, path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        tensors, header = read_safetensors(op, path)
        if header.get("format") == FORMAT:
            raise ValueError(f"{op}: {path} was saved by save_pretrained; read it with its inverse")
        return tensors
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{op}: checkpoint {path} cannot be read ({reason})") from error
    if isinstance(found, Mapping):
        inner = [found[name] for name in WRAPPERS if isinstance(found.get(name), Mapping)]
        found = inner[0] if inner else found
    fits = isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    )
    if not fits or not found:
        raise ValueError(f"{op}: checkpoint {path} must hold tensors by name")
    return dict(found)


def read_safetensors(op: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{op}: {path} is not a safetensors file ({error})") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Writes in a folder beside `path` and renames, so that a reader never sees half a file."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        save_file(whole, draft, header)
        os.replace(draft, path)
