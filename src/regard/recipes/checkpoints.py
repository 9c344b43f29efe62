"""Checkpoints: written whole or not at all, read without running code from them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from regard.core.state import write_atomically

FORMAT = "regard.checkpoint/1"


def write(path: Path, **content: Any) -> None:
    """Tensors, numbers, strings, lists and dicts of them, under names."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU; a file of anything else is refused with the reason."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint: {path} cannot be read ({reason})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} must be a {FORMAT} file")
    return found
