"""Plans in files: safetensors with a seal, so that a damaged file is never read in part."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core.state import write_atomically


def write_plan(
    path: str | Path, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes plain fields and tensors, whole or not at all; `kind` says what they are."""
    from safetensors.torch import save  # not with regard itself

    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    plan = json.dumps(fields)
    content = save(held, {"kind": kind, "plan": plan, "seal": _seal(plan, held)})
    write_atomically(Path(path), content)


def read_plan(
    op: str, path: str | Path, kind: str, what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_plan` wrote; ValueError for any other file, and for one that has changed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{op}: {path} is damaged ({error})") from error
    if about.get("kind") != kind:
        raise ValueError(f"{op}: {path} is not a saved {what}")
    plan = about.get("plan", "")
    if about.get("seal") != _seal(plan, tensors):
        raise ValueError(f"{op}: {path} is damaged (its contents do not fit its seal)")
    return json.loads(plan), tensors


def _seal(plan: str, tensors: Mapping[str, Tensor]) -> str:
    """A checksum of everything."""
    found = zlib.crc32(plan.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name}{tensor.dtype}{list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes(), found)
    return f"{found:08x}"
