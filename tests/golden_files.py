"""Files of golden data: weights, inputs, outputs and gradients of the authors' own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def parts(name: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of `folder/file` by the word before the first dot: state, in, out, grad."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(GOLDEN / f"{name}.safetensors").items():
        part, _, rest = key.partition(".")
        found.setdefault(part, {})[rest] = tensor
    return found


def settings(name: str) -> dict[str, Any]:
    """The arguments of the authors' class, as they are written down beside the tensors."""
    return json.loads((GOLDEN / f"{name}.json").read_text())["config"]
