"""Named models: what was published, as a function of a config, and how to load it."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Paper
from regard.core.checks import describe, nearest, reject, words
from regard.models.files import published_config, read_published
from regard.models.keys import Keys
from regard.models.pretrained import Pretrained, build, shapes_of

OP = "create_model"


class UnknownModel(KeyError):
    """No model of that name; the message offers the nearest one."""

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Variant:
    """A published model.

    config: sizes as keyword arguments, with those of the publication as defaults -> a config.
    model: the class that the config is for.
    keys: the names of the authors' tensors.
    settings: the authors' `config.json` -> arguments of `config`.
    measured: the authors' tensors -> those arguments of `config` that their shapes tell.
    """

    paper: Paper
    config: Callable[..., Any]
    model: type[Pretrained]
    keys: Keys
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    measured: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None

    @property
    def summary(self) -> str:
        """The first line of the config's docstring."""
        return (inspect.getdoc(self.config) or "").split("\n", 1)[0]


class Published(Mapping[str, Variant]):
    """Models by name: the `VARIANTS` of the folders beside this file."""

    def __getitem__(self, name: str) -> Variant:
        variants = _variants()
        if name not in variants:
            hint, known = nearest(name, variants), ", ".join(variants)
            raise UnknownModel(f"no model is called {name!r}{hint} (known: {known})")
        return variants[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_variants())

    def __len__(self) -> int:
        return len(_variants())

    def __repr__(self) -> str:
        return f"Published({', '.join(self)})"


@cache
def _variants() -> dict[str, Variant]:
    package = importlib.import_module("regard.models")
    found: dict[str, Variant] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            folder = importlib.import_module(f"regard.models.{module.name}")
            found |= getattr(folder, "VARIANTS", {})  # `vision` holds what others share
    return dict(sorted(found.items()))


published = Published()


def names() -> tuple[str, ...]:
    """The names that `create_model` knows.

    >>> "mesanet" in names()
    True
    """
    return tuple(published)


def create_model(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **sizes: Any,
) -> Any:
    """A published model by name, with its initial values or with the authors' checkpoint.

    Args:
        name: one of `regard.models.names()`.
        checkpoint: the authors' file or folder as published: `.safetensors`, or what
            `torch.save` wrote, which is read as weights only and runs no code. Sizes come from
            the folder's `config.json`, if it has one, or, of vision models, from the tensors.
        device: "meta" gives the shapes without the memory.
        dtype: of the parameters. None: that of the checkpoint, or torch's default.
        sizes: arguments of the model's config, `regard.models.published[name].config`, where they
            are not as published.

    Raises:
        KeyError: no model has that name.
        FileNotFoundError, ValueError: there is no such file, or it is damaged or not exactly of
            this model; then nothing was loaded.
        TypeError: a size that the config does not have.

    >>> model = create_model("mesanet", device="meta")
    >>> f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    '1,366,316,800'
    >>> create_model("mesanet", dim=64, heads=4, head_dim=16, layers=2, vocabulary=100).config.dim
    64
    """
    variant = published[name]
    if checkpoint is not None and variant.settings is not None:
        theirs = published_config(checkpoint)
        if theirs is not None:
            try:
                sizes = {**variant.settings(theirs), **sizes}
            except (KeyError, TypeError) as error:
                raise ValueError(f"{OP}: config.json of {checkpoint} lacks {error}") from error
    known = list(inspect.signature(variant.config).parameters)
    for size in sizes:
        if size not in known:
            accepted = f"arguments of {name} ({', '.join(known)})"
            got = words(describe(size) + nearest(size, known))
            raise reject(OP, "sizes", accepted, got, kind=TypeError)
    if checkpoint is None:
        return build(variant.model, variant.config(**sizes), device=device, dtype=dtype, op=OP)
    tensors = read_published(OP, checkpoint)
    if variant.measured is not None:
        sizes = {**variant.measured(tensors), **sizes}
    config = variant.config(**sizes)
    with torch.device("meta"):
        shapes = shapes_of(variant.model(config))
    ours = variant.keys.to_ours(OP, tensors, shapes)
    return build(variant.model, config, ours, device=device, dtype=dtype, op=OP)
