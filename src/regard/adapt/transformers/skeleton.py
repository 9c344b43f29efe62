"""The model of a folder without its weights: enough to know its layers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from regard.core.checks import reject, words


def skeleton(folder: str | os.PathLike[str]) -> Any:
    """The model that `config.json` describes, on the meta device: it has shapes and no numbers.

    Nothing but `config.json` is read, nothing is downloaded, and no code of the folder is run: the
    class is the one of transformers that `architectures` names, or else the one of `model_type`.

    Raises: ValueError: no such folder, no `config.json`, one that transformers makes no model of.

    >>> import tempfile
    >>> from transformers import BertConfig
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     BertConfig(num_hidden_layers=2, architectures=["BertModel"]).save_pretrained(folder)
    ...     len(skeleton(folder).encoder.layer)
    2
    """
    import transformers

    place = Path(folder)
    if not place.is_dir():
        raise reject("skeleton", "folder", "a folder", str(place))
    file = place / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        accepted = "one with a config.json, as save_pretrained of transformers writes it"
        raise reject("skeleton", "folder", accepted, words(f"none in {place}")) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"skeleton: {file} cannot be read as JSON ({error})") from error
    if not isinstance(described, dict) or "model_type" not in described:
        timm = isinstance(described, dict) and "architecture" in described
        hint = "; models of timm: regard.adapt.timm.report" if timm else ""
        accepted = f"one whose config.json has a model_type of transformers{hint}"
        raise reject("skeleton", "folder", accepted, words("none"))
    try:
        config = transformers.AutoConfig.from_pretrained(
            place, local_files_only=True, trust_remote_code=False
        )
        kind = _kind(config)
        with torch.device("meta"):
            return kind._from_config(config, attn_implementation="eager").eval()
    # Whatever a broken config makes of itself in there, it is the folder that is wrong.
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        what = f"{type(error).__name__}: {said}"
        raise ValueError(f"skeleton: transformers makes no model of {file} ({what})") from error


def _kind(config: Any) -> Any:
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.MODEL_MAPPING[type(config)]
