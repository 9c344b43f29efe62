"""Laws about values: the reference, the forms, and every size."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from regard.core.dispatch import IMPLS
from regard.core.patterns import Pattern
from regard.testing.law import DoesNotApply, law
from regard.testing.subject import Subject

BOTH = (torch.float64, torch.float32)


@law(cost="cheap")
def equals_reference(s: Subject) -> str | None:
    """Equals the float64 reference, with every option alone and with all together."""
    for options in s.option_sets():
        for forget in (False, True) if "log_decay" in options else (False,):
            call = s.sample(options, forget=forget)
            compare(s, call, _named(options, forget))
    if "log_decay" in s.options:  # a mechanism without a state matrix may take it per query head
        call = s.sample(("log_decay",))
        group = call["q"].shape[1] // call["k"].shape[1]
        decay = call["log_decay"].repeat_interleave(group, 1)
        decay = decay * torch.linspace(0.5, 2.0, decay.shape[1]).to(decay)[:, None]
        per_head = call.with_tensor("log_decay", decay.float().double(), ("b", "h", "s"))
        try:
            s.run(per_head)
        except ValueError:
            pass
        else:
            compare(s, per_head, "with log_decay on query heads")
    return "; ".join(f"refuses {name} here" for name in s.refused) or None


def compare(s: Subject, call, what: str) -> None:
    """Shape, dtype and values of one call against the reference, in float64 and float32."""
    expected = s.reference(call)
    for dtype in BOTH:
        out = s.run(call.to(dtype))
        s.require(isinstance(out, torch.Tensor), f"{what}: the op must return one tensor")
        if out.dtype != dtype or out.device != call["q"].device:
            s.broken(f"{what}: the output is {out.dtype} on {out.device}", dtype)
        s.close(out, expected, "value", what, dtype)


def _named(options: tuple[str, ...], forget: bool = False) -> str:
    words = ", ".join(options) or "no options"
    return f"with {words}" + (" (-inf among the decays)" if forget else "")


@law(needs=("impl",), cost="cheap")
def forms(s: Subject) -> str | None:
    """All forms that can serve a call agree pairwise, and the others refuse by name."""
    seen: set[str] = set()
    for options in s.some_options():
        call = s.sample(options)
        for dtype in BOTH:
            typed = call.to(dtype)
            available = s.available(typed)
            seen.update(available)
            if not available:
                raise DoesNotApply("the op chooses among no forms")
            outputs = {impl: s.run(typed, impl=impl) for impl in available}
            for one, other in itertools.combinations(outputs, 2):
                what = f"{one} against {other}, {_named(options)}"
                s.close(outputs[one], outputs[other], "value", what, dtype)
        for impl in set(IMPLS) - {"auto", *available}:
            try:
                s.run(typed, impl=impl)
            except ValueError as error:
                s.require("impl" in str(error), f"impl={impl!r} is refused without naming impl")
            else:
                s.broken(f"impl={impl!r} ran although it cannot serve this call")
    return f"forms: {', '.join(sorted(seen))}"


@law(cost="rotated")
def scalar_tensors(s: Subject) -> None:
    """A scale or ridge in a tensor of no axes is the number it holds, in value and gradient."""
    names = [n for n in ("scale", "ridge") if s.card.accepts(n) and n not in s.case.options]
    if not names:
        raise DoesNotApply("the op takes neither a scale nor a ridge")
    for name in names:
        call = s.sample(())
        number = torch.tensor(0.375, dtype=torch.float64, device=s.device)
        one = call.with_tensor(name, number, ())
        per_head = call.with_tensors(**{name: number.expand(call["q"].shape[1]).clone()})
        for dtype in BOTH:
            expected, wide = s.gradients(per_head.to(dtype))
            wide[name] = wide[name].sum()
            for impl in ("auto", *s.available(one.to(dtype).leaves())):
                extra: dict[str, Any] = {} if impl == "auto" else {"impl": impl}
                what = f"{name} of no axes, impl={impl!r}"
                out, gradients = s.gradients(one.to(dtype), **extra)
                s.close(out, expected, "value", what, dtype)
                s.close_all(one, gradients, wide, "gradient", what, dtype)
            s.close(s.run(call.to(dtype).with_options(**{name: 0.375})), expected, "value", name)


@law(cost="rotated")
def odd_lengths(s: Subject) -> None:
    """Right at the lengths 1, 2, 7, 33 and 130."""
    s.free_lengths()
    lengths = (1, 2, 7, 33, 130)
    for position, T in enumerate(lengths):
        S = lengths[(position + 2) % len(lengths)] if s.pattern.cross else T
        for options in s.some_options():
            call = s.sample(options, B=1, H=2, Hk=1, T=T, S=S, salt=T)
            out = s.run(call.to(torch.float32))
            s.close(out, s.reference(call), "value", f"T={T}, S={S}, {_named(options)}")


@law(cost="rotated")
def empty(s: Subject) -> None:
    """No batch, no queries or no keys: the right shape, 0 where there is no key, a gradient."""
    s.free_lengths()
    for dims in ({"B": 0}, {"T": 0, "S": 0}, {"S": 0}, {"T": 0, "S": 5}, {"B": 0, "S": 0}):
        for options in s.some_options():
            lengths: dict[str, Any] = {"T": 4, **dims}
            call = s.sample(options, **lengths).to(torch.float32)
            out, gradients = s.gradients(call)
            B, H, T = call["q"].shape[:3]
            expected = [B, H, T, call["v"].shape[3]]
            what = f"{dims}, {_named(options)}"
            s.require(list(out.shape) == expected, f"{what}: shape {list(out.shape)}")
            if call.size("s") == 0:
                s.zero(out, f"{what}: output")
                for name, gradient in gradients.items():
                    s.zero(gradient, f"{what}: gradient of {name}")
            for name, gradient in gradients.items():
                s.require(gradient.shape == call[name].shape, f"{what}: gradient of {name}")


@law(cost="cheap")
def query_key_lengths(s: Subject) -> None:
    """T != S, fewer keys than queries among them: equal to the reference, 0 before a first key."""
    s.free_lengths()
    for T, S in ((3, 11), (11, 3), (1, 9), (9, 1)):
        for options in s.some_options():
            call = s.sample(options, T=T, S=S, salt=(T, S))
            compare(s, call, f"T={T}, S={S}, {_named(options)}")
            if s.pattern.causal and T > S:
                early = s.run(call.to(torch.float32))[:, :, : T - S]
                s.zero(early, f"T={T}, S={S}: rows before the first key")


@law(cost="rotated")
def value_size(s: Subject) -> None:
    """Values may be of another size than keys."""
    if "Dv" in s.case.dims:
        raise DoesNotApply("the case fixes Dv")
    for Dv in (1, 5, 24):
        for options in s.some_options():
            call = s.sample(options, Dv=Dv, salt=Dv)
            compare(s, call, f"Dv={Dv}, {_named(options)}")


@law(cost="rotated")
def grouped_queries(s: Subject) -> None:
    """Grouped queries equal repeated key heads, in value and gradient."""
    if {"H", "Hk"} & set(s.case.dims):
        raise DoesNotApply("the case fixes its heads")
    for H, Hk in ((4, 1), (6, 2), (3, 3)):
        for options in s.some_options():
            call = s.sample(options, H=H, Hk=Hk, salt=(H, Hk))
            group = H // Hk
            repeated = call.repeat_heads(group)
            for dtype in BOTH:
                what = f"H={H}, Hk={Hk}, {_named(options)}"
                out, gradients = s.gradients(call.to(dtype))
                expected, wide = s.gradients(repeated.to(dtype))
                s.close(out, expected, "same", what)
                for name in call.along("hk"):
                    if name in wide:
                        axis = call.axes[name].index("hk")
                        wide[name] = wide[name].unflatten(axis, (Hk, group)).sum(axis + 1)
                s.close_all(call, gradients, wide, "gradient", what, dtype)


ONLINE = tuple(pattern for pattern in Pattern if pattern.online)
