"""The names that authors gave the tensors of a model, and ours: a table read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from regard.core.checks import reject, words

Shapes = Mapping[str, torch.Size]
SHOWN = 4  # names in one message


@dataclass(frozen=True)
class Form:
    """How a tensor of ours is made of theirs, and taken apart again.

    `join(parts, shape)` gets their tensors and our shape; `split(tensor)` gives theirs, also
    for a tensor on the meta device, which is how their shapes are known.
    """

    join: Callable[[Sequence[Tensor], torch.Size], Tensor]
    split: Callable[[Tensor], tuple[Tensor, ...]]


SAME = Form(lambda parts, shape: parts[0], lambda tensor: (tensor,))


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and those of the authors that it is made of; `{}` is a layer's number."""

    ours: str
    theirs: tuple[str, ...]
    form: Form = SAME

    def within(self, ours: str, theirs: str) -> Entry:
        """The same below a prefix."""
        names = tuple(theirs + name for name in self.theirs)
        return replace(self, ours=ours + self.ours, theirs=names)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches our name, with the layer's number as its group."""
        return _pattern(self.ours)


def renamed(*pairs: tuple[str, str]) -> tuple[Entry, ...]:
    """Entries of tensors that differ in name only, from (ours, theirs)."""
    return tuple(Entry(ours, (theirs,)) for ours, theirs in pairs)


def kept(*names: str) -> tuple[Entry, ...]:
    """Entries of tensors that have one name in both."""
    return renamed(*((name, name) for name in names))


def within(entries: Iterable[Entry], ours: str, theirs: str) -> tuple[Entry, ...]:
    """All entries below a prefix."""
    return tuple(entry.within(ours, theirs) for entry in entries)


@dataclass(frozen=True)
class Keys:
    """The table of one layout.

    repeated: their name -> that of the tensor which it must equal where our model has it once,
        as a tied head repeats the embedding.
    derived: names of theirs, `{}` for a number, of what their model computes from its sizes: it
        may be in a checkpoint and is not read.

    >>> keys = Keys(renamed(("layers.{}.mixer.q_proj.weight", "h.{}.attn.q.weight")))
    >>> list(keys.to_theirs({"layers.3.mixer.q_proj.weight": torch.zeros(2, 2)}))
    ['h.3.attn.q.weight']
    """

    entries: tuple[Entry, ...]
    repeated: Mapping[str, str] | None = None
    derived: tuple[str, ...] = ()

    def _is_derived(self, name: str) -> bool:
        return any(_pattern(known).fullmatch(name) for known in self.derived)

    def _entry(self, name: str) -> tuple[Entry, tuple[str, ...]]:
        for entry in self.entries:
            match = entry.pattern.fullmatch(name)
            if match is not None:
                return entry, tuple(their.format(*match.groups()) for their in entry.theirs)
        raise reject("Keys", "name", "of a tensor that the authors' model has, too", name)

    def to_ours(self, op: str, theirs: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """Our tensors from theirs, if these are all that our shapes ask for and nothing else."""
        found, missing, wrong, used = {}, [], [], set()
        for name, shape in shapes.items():
            entry, names = self._entry(name)
            used.update(names)
            absent = [their for their in names if their not in theirs]
            missing += absent
            if absent:
                continue
            wanted = entry.form.split(torch.empty(shape, device="meta"))
            parts = [theirs[their] for their in names]
            pairs = zip(names, parts, wanted, strict=True)
            bad = [(n, p, w) for n, p, w in pairs if p.shape != w.shape]
            wrong += [f"{n} {list(p.shape)} instead of {list(w.shape)}" for n, p, w in bad]
            if not bad:
                found[name] = entry.form.join(parts, shape)
        for name, origin in (self.repeated or {}).items():
            both = name in theirs and origin in theirs and name not in used
            if both and torch.equal(theirs[name], theirs[origin]):
                used.add(name)
        unexpected = [n for n in theirs if n not in used and not self._is_derived(n)]
        refuse_differences(op, missing, unexpected, wrong)
        return found

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors from ours."""
        made: dict[str, Tensor] = {}
        for name, tensor in ours.items():
            entry, names = self._entry(name)
            made |= dict(zip(names, entry.form.split(tensor), strict=True))
        return made


def refuse_differences(
    op: str, missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str]
) -> None:
    """Raises if tensors are missing, of no use or of another shape, naming the first of each."""
    lists = {"no": missing, "the unknown": unexpected, "": wrong}
    faults = [f"{word} {_few(names)}".strip() for word, names in lists.items() if names]
    if faults:
        accepted = "that of exactly this model"
        raise reject(op, "checkpoint", accepted, words(f"one with {'; '.join(faults)}"))


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """Matches a name in which `{}` stands for a number."""
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))


def _few(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
