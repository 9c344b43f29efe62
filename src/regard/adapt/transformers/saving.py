"""A swapped model in a folder, and back.

The folder is what the model's own `save_pretrained` writes, without our parameters, so that
anybody loads the model as it was; beside it lie `regard_swap.json`, which names the mechanism of
every layer, and `regard_swap.safetensors`, which holds what they learned.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from regard.adapt.swapped import ATTRIBUTE
from regard.adapt.transformers.mechanism import Mechanism
from regard.adapt.transformers.sites import sites
from regard.adapt.transformers.swapping import swap
from regard.core.checks import reject, words
from regard.core.state import write_atomically

FORMAT = "regard.swap/1"
SETTINGS, TENSORS = "regard_swap.json", "regard_swap.safetensors"


def save_pretrained(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes the model, the mechanisms in its layers and what they learned.

    Raises: ValueError for a model without swapped layers (its own `save_pretrained` will do).
    """
    from safetensors.torch import save

    found = {site.name: _part(site.module) for site in sites(model)}
    swapped = {name: part for name, part in found.items() if part is not None}
    if not swapped:
        raise reject("save_pretrained", "model", "one with swapped layers", words("one without"))
    place = Path(folder)
    mark = f".{ATTRIBUTE}."
    states = model.state_dict()
    model.save_pretrained(place, state_dict={n: x for n, x in states.items() if mark not in n})
    ours = {n: x.detach().contiguous().clone() for n, x in states.items() if mark in n}
    write_atomically(place / TENSORS, save(ours, {"format": FORMAT}))
    layers = {name: _settings(part) for name, part in swapped.items()}
    text = json.dumps({"format": FORMAT, "layers": layers}, indent=2)
    write_atomically(place / SETTINGS, text.encode())


def from_pretrained(folder: str | os.PathLike[str], model: Any = None, **options: Any) -> Any:
    """The model that `save_pretrained` wrote, with its mechanisms, in evaluation mode.

    Args:
        model: a model to put the mechanisms into, already loaded; None: the class that the
            folder's config names is loaded from the folder.
        options: for that class's `from_pretrained`.

    Raises: ValueError for a folder without `regard_swap.json`, or tensors that do not fit.
    """
    from safetensors.torch import load_file

    place = Path(folder)
    try:
        found = json.loads((place / SETTINGS).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"from_pretrained: {place} has no {SETTINGS}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"from_pretrained: {place / SETTINGS} is not JSON ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"from_pretrained: {place / SETTINGS} must be a {FORMAT} file")
    model = _load(place, options) if model is None else model
    for name, settings in found["layers"].items():
        own = dict(settings)
        mechanism, given = own.pop("mechanism"), own.pop("options")
        swap(model, mechanism, name, **own, **given)
    tensors = load_file(place / TENSORS)
    _, unexpected = model.load_state_dict(tensors, strict=False)
    expected = {n for n in model.state_dict() if f".{ATTRIBUTE}." in n}
    if unexpected or expected != set(tensors):
        wrong = sorted({*unexpected, *(expected ^ set(tensors))})
        raise ValueError(f"from_pretrained: {place / TENSORS} does not fit: {', '.join(wrong)}")
    return model.eval() if isinstance(model, nn.Module) else model


def _load(place: Path, options: dict[str, Any]) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(place)
    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        accepted = "of an architecture of transformers (or give `model`)"
        raise reject("from_pretrained", "folder", accepted, words(f"one of {name!r}"))
    return kind.from_pretrained(place, **options)


def _part(module: nn.Module) -> Mechanism | None:
    part = getattr(module, ATTRIBUTE, None)
    return part if isinstance(part, Mechanism) else None


def _settings(part: Mechanism) -> dict[str, Any]:
    given = {"mechanism": part.card.name, "learn": list(part.learn), "drop": list(part.drop)}
    return {**given, "past": part.past, "options": part.given}
