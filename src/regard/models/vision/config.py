"""What configs of vision backbones share, and published variants of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from regard.core.checks import check_integer, check_number, nearest, reject, words


@dataclass(frozen=True)
class VisionConfig:
    """A classifier of images.

    classes: of the head. channels: of the image. drop_path: probability of leaving out a branch of
        the last block; earlier blocks have less, in even steps. norm_eps: of the layer norms.
    """

    classes: int = 1000
    channels: int = 3
    drop_path: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        op = type(self).__name__
        check_integer(op, "classes", self.classes)
        check_integer(op, "channels", self.channels)
        check_number(op, "drop_path", self.drop_path, least=0.0)
        check_number(op, "norm_eps", self.norm_eps, above=0.0)
        if self.drop_path >= 1:
            raise reject(op, "drop_path", "a probability below 1", self.drop_path)
        for item in fields(self):  # what JSON makes a list of, and what a caller gives as one
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))

    def per_stage(self, *names: str, stages: int | None = None) -> None:
        """These fields are tuples of positive numbers, one for each stage; at least one stage."""
        op = type(self).__name__
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value:
                raise reject(op, name, "a tuple with a number per stage", value, kind=TypeError)
            stages = len(value) if stages is None else stages
            if len(value) != stages:
                raise reject(op, name, f"of {stages} numbers, as {names[0]}", value)
            for number in value:
                check_number(op, name, number, above=0.0)

    def plain(self) -> dict[str, Any]:
        """Numbers, strings and tuples of them."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `plain`, also after a passage through JSON."""
        known = [item.name for item in fields(cls)]
        for name in plain:
            if name not in known:
                got = words(repr(name) + nearest(name, known))
                raise reject(cls.__name__, "plain", "of known fields", got)
        return cls(**plain)


def variant(
    config: Callable[..., Any], name: str, summary: str, **sizes: Any
) -> Callable[..., Any]:
    """A published variant: a function like `config`, with these sizes as defaults.

    >>> small = variant(VisionConfig, "small", "A small one.", classes=10)
    >>> small().classes, small(classes=3).classes
    (10, 3)
    """

    def make(**given: Any) -> Any:
        return config(**{**sizes, **given})

    signature = inspect.signature(config)
    parameters = [
        p.replace(default=sizes.get(p.name, p.default), kind=inspect.Parameter.KEYWORD_ONLY)
        for p in signature.parameters.values()
    ]
    functools.update_wrapper(make, config, assigned=(), updated=())
    make.__name__, make.__qualname__, make.__doc__ = name, name, summary
    make.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return make
