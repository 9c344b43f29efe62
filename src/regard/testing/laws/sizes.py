"""Laws about sizes that should not matter: those of tiles, and lengths beyond one tile."""

from __future__ import annotations

from typing import Any

import torch

from regard.testing.law import DoesNotApply, law
from regard.testing.laws.masks import ONLINE, leaks
from regard.testing.laws.values import BOTH
from regard.testing.subject import Subject

TILING = ("block_size", "chunk_size")


@law(cost="rotated")
def tiling(s: Subject) -> None:
    """A size of blocks or chunks changes nothing but rounding, in value and gradient."""
    arguments = [name for name in TILING if s.card.accepts(name) and name not in s.case.options]
    if not arguments:
        raise DoesNotApply(f"the op has no argument {' or '.join(TILING)} to vary")
    for name in arguments:
        for dtype in BOTH:
            call = s.sample(s.all_options).to(dtype)
            for size in (1, 3, 16, call.size("t") + 5):
                sized = call.with_options(**{name: size})
                # A form without tiles may refuse a size; the others are compared to themselves.
                impls = s.available(sized.leaves())
                choices: list[dict[str, Any]] = [{"impl": impl} for impl in impls] or [{}]
                for extra in choices:
                    what = f"{name}={size}, {extra}, options {s.all_options}"
                    expected, wanted = s.gradients(call, **extra)
                    out, found = s.gradients(sized, **extra)
                    s.close(out, expected, "same", what)
                    s.close_all(call, found, wanted, "same", what, dtype)


@law(cost="rotated")
def long(s: Subject) -> None:
    """Right at 300 tokens, beyond one tile of any usual size, and without a leak there."""
    s.free_lengths()
    for options in dict.fromkeys(((), s.all_options)):
        call = s.sample(options, B=1, H=1, Hk=1, T=300, S=300)
        what = f"T=S=300, options {options}"
        typed = call.to(torch.float32)
        s.close(s.run(typed), s.reference(call), "value", what, torch.float32)
        if s.pattern in ONLINE:
            axes = "t" if s.pattern.cross else "ts"
            # Sums of 1e30 over many later tokens overflow in later rows: outputs only.
            leaks(s, typed, axes, (150, 260), (1.0, 1e4, 1e30), what, gradients_to=1e4)
