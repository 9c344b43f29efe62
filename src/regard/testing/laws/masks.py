"""Laws about what may not be seen: padding, masked junk, missing keys, the future."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from regard.testing.calls import Call, junk
from regard.testing.law import DoesNotApply, law
from regard.testing.laws.values import ONLINE
from regard.testing.subject import Subject


@law(needs=("key_mask",), cost="cheap")
def padding(s: Subject) -> None:
    """Left- and right-padded equals unpadded, in value and gradient."""
    s.free_lengths()
    # Where queries stay as they are, padding moves keys against them: a window would move too.
    without = ("window", "bias") if s.pattern.cross else ()
    for options in s.some_options(without):
        real = s.sample(options)
        # A dense operand of a cross pattern is joined along its keys only.
        pad = s.sample(options, T=real.size("t") if s.pattern.cross else 3, S=3, salt="pad")
        pad = _like_axes(real, pad)
        n, T = real.size("s"), real.size("t")
        for side in ("left", "right"):
            both = real.join(pad, s.tokens, before=side == "left")
            first = 0 if side == "right" else 3
            row = 0 if s.pattern.cross else first
            # Only the first sequence is padded; its neighbours have tokens there.
            mask = torch.ones(real["k"].shape[0], n + 3, dtype=torch.bool, device=s.device)
            mask[0] = False
            mask[0, first : first + n] = real["key_mask"][0] if "key_mask" in real else True
            both = both.with_tensors(key_mask=mask)
            for dtype in (torch.float64, torch.float32):
                wanted, expected = s.gradients(real.to(dtype).rows(torch.tensor([0])))
                row_weight = s.cotangent(wanted)
                whole = s.run(both.to(dtype))
                weight = torch.zeros_like(whole)
                weight[:1, :, row : row + T] = row_weight
                out, gradients = s.gradients(both.to(dtype), weight=weight)
                what = f"{side}-padded, options {options}"
                s.close(out[:1, :, row : row + T], wanted, "same", what)
                parts = {}
                for name, gradient in gradients.items():
                    for position, axis in enumerate(both.axes[name]):
                        if axis == "b":
                            gradient = gradient.narrow(position, 0, 1)
                        elif axis in s.tokens:
                            size = expected[name].shape[position]
                            start = first if axis == "s" else row
                            gradient = gradient.narrow(position, start, size)
                    parts[name] = gradient
                s.close_all(real, parts, expected, "gradient", what, dtype)


def _like_axes(real: Call, pad: Call) -> Call:
    """The padding's operands on as many heads as the real ones (a key bias may have one)."""

    def match(name: str, tensor: Tensor) -> Tensor:
        axes = real.axes[name]
        if pad.axes[name] == axes:
            return tensor
        return tensor[:, :1].expand([pad.size(axis) if axis != "1" else 1 for axis in axes])

    return pad.map(match)


@law(needs=("key_mask",), cost="cheap")
def masked_junk(s: Subject) -> None:
    """Whatever a masked key contains (NaN, inf, 1e30) changes no bit of a value or gradient."""
    for options in s.some_options():
        options = tuple(dict.fromkeys((*options, "key_mask")))
        _junk_unseen(s, s.sample(options).to(torch.float32), f"options {options}")


@law(needs=("key_mask", "impl"), cost="rotated")
def masked_junk_forms(s: Subject) -> str:
    """Every form that can be asked for ignores what a masked key contains, biases included."""
    options = tuple(dict.fromkeys((*s.all_options, "key_mask")))
    alone = [n for n in ("log_decay", "key_bias") if n in s.options and n not in options]
    seen: set[str] = set()
    for chosen in (options, *((name, "key_mask") for name in alone)):
        call = s.sample(chosen).to(torch.float32)
        for impl in _impls(s, call):
            seen.add(impl)
            _junk_unseen(s, call, f"impl={impl!r}, options {chosen}", impl=impl)
    return f"forms: {', '.join(sorted(seen))}"


def _impls(s: Subject, call: Call) -> tuple[str, ...]:
    """The values of `impl` that can serve this call with gradients."""
    available = s.available(call.leaves())
    if not available:
        raise DoesNotApply("the op chooses among no forms")
    return available


def _junk_unseen(s: Subject, call: Call, where: str, **extra: Any) -> None:
    """Junk in the masked keys of every tensor of this call changes nothing."""
    mask = call["key_mask"]
    names = [n for n in call.along("s") if n != "key_mask" and "b" in call.axes[n]]
    expected, wanted = s.gradients(call, **extra)
    for value in (math.nan, math.inf, -math.inf, 1e30):
        spoilt = _spoil(call, names, value)
        what = f"{value} in masked keys, {where}"
        s.identical(s.run(spoilt, **extra), expected, f"{what}: output without gradients")
        out, gradients = s.gradients(spoilt, **extra)
        s.identical(out, expected, f"{what}: output")
        for name, gradient in gradients.items():
            s.identical(gradient, wanted[name], f"{what}: gradient of {name}")
            if name in names:
                at_masked = gradient.masked_fill(call.spread(mask, name), 0.0)
                s.zero(at_masked, f"{what}: gradient of masked {name}")


def _spoil(call: Call, names: list[str], value: float) -> Call:
    """The call with `value` in the masked keys of these tensors."""

    def change(name: str, tensor: Tensor) -> Tensor:
        if name not in names or call.domains[name] == "flag":  # a plan is no content of a key
            return tensor
        if value != 1e30 and tensor.is_floating_point():
            worse = torch.full_like(tensor, value)
        else:
            worse = junk(tensor, call.domains[name], value)
        return torch.where(call.spread(call["key_mask"], name), tensor, worse)

    return call.map(change)


@law(needs=("key_mask",), cost="cheap")
def no_keys(s: Subject) -> None:
    """Rows that see no key give 0 and send no gradient; other rows do not notice."""
    for options in s.some_options():
        options = tuple(dict.fromkeys((*options, "key_mask")))
        call = s.sample(options).to(torch.float32)
        mask = call["key_mask"].clone()
        mask[0] = False
        blind = call.with_tensors(key_mask=mask)
        out, gradients = s.gradients(blind)
        s.zero(out[0], f"no keys, options {options}: output")
        for name, gradient in gradients.items():
            s.require(bool(gradient.isfinite().all()), f"no keys: gradient of {name} is not finite")
            if blind.axes[name][0] == "b":
                s.zero(gradient[0], f"no keys, options {options}: gradient of {name}")
        s.close(out[1:], s.run(call)[1:], "same", "the rows beside the one without keys")


@law(patterns=ONLINE, cost="cheap")
def no_leak(s: Subject) -> None:
    """Nothing in the future (values up to 1e30) changes a bit of an output or gradient before."""
    for options in s.some_options():
        call, axes = _unseen_future(s, options)
        T = call.size("t")
        if len(axes) == 2 and call.size("s") != T:
            continue
        places = (0, T // 2, T - 2) if T > 2 else (0,)
        leaks(s, call, axes, places, (1.0, 1e4, -1e4, 1e30, -1e30), f"options {options}")


@law(needs=("impl",), patterns=ONLINE, cost="rotated")
def no_leak_forms(s: Subject) -> str:
    """Every form keeps the future from outputs and gradients before it, the reference too."""
    call, axes = _unseen_future(s, s.all_options)
    T, impls = call.size("t"), _impls(s, call)
    if len(axes) == 2 and call.size("s") != T:
        raise DoesNotApply("the case fixes other lengths of queries and keys")
    for impl in impls:
        what = f"impl={impl!r}, options {s.all_options}"
        leaks(s, call, axes, (T // 2,), (1.0, 1e30, -1e30), what, impl=impl)
    return f"forms: {', '.join(impls)}"


def _unseen_future(s: Subject, options: Iterable[str]) -> tuple[Call, str]:
    """A call of a few tiles, and the axes along which its future lies."""
    dims: dict[str, Any] = {}
    if not {"T", "S"} & set(s.case.dims):
        # With fewer keys than queries most causal rows would be 0 and could tell nothing.
        dims = {"T": 37, "S": 45 if s.pattern.cross else 37}
    call = s.sample(options, B=1, **dims).to(torch.float32)
    return call, "t" if s.pattern.cross else "ts"


def leaks(
    s: Subject,
    call: Call,
    axes: str,
    places: Iterable[int],
    values: Iterable[float],
    where: str,
    *,
    gradients_to: float = math.inf,
    **extra: Any,
) -> None:
    """Breaks the law if one of `values` after one of the queries `places` is noticed before.

    Gradients are checked under values up to `gradients_to`, outputs under all.
    """
    T, values = call.size("t"), tuple(values)
    for t in places:
        weight = torch.zeros_like(s.run(call, **extra))
        weight[:, :, : t + 1] = s.cotangent(weight)[:, :, : t + 1]
        expected, wanted = s.gradients(call, weight=weight, **extra)
        for value in values:
            what = f"{value:g} after query {t}, {where}"
            changed = s.run(_after(s, call, axes, t + 1, value), **extra)
            s.identical(changed[:, :, : t + 1], expected[:, :, : t + 1], f"{what}: output")
            if abs(value) > gradients_to:
                continue
            # A later row of huge queries and keys may itself overflow, and 0 times its inf
            # is no zero: for gradients, later queries are at most 1e4.
            mild = _after(s, call, axes, t + 1, value, most=1e4)
            out, gradients = s.gradients(mild, weight=weight, **extra)
            s.identical(out[:, :, : t + 1], expected[:, :, : t + 1], f"{what}: output")
            for name, gradient in gradients.items():
                early, late = gradient, None
                before = wanted[name]
                for position, axis in enumerate(call.axes[name]):
                    if axis in axes:
                        late = early.narrow(position, t + 1, T - t - 1)
                        early = early.narrow(position, 0, t + 1)
                        before = before.narrow(position, 0, t + 1)
                s.identical(early, before, f"{what}: gradient of {name}")
                if late is not None:
                    s.zero(late, f"{what}: gradient of later {name}")


def _after(
    s: Subject, call: Call, axes: str, start: int, value: float, most: float = math.inf
) -> Call:
    """The call with all tensors from token `start` on replaced by `value` (1.0: by new samples)."""

    def change(name: str, tensor: Tensor) -> Tensor:
        own = [axis for axis in call.axes[name] if axis in axes]
        if not own or call.domains[name] == "flag":  # a plan is no value of a token
            return tensor
        size = min(abs(value), most) if "t" in own else abs(value)
        tensor = tensor.clone()
        for axis in own:
            position = call.axes[name].index(axis)
            late = tensor.narrow(position, start, tensor.shape[position] - start)
            if abs(value) == 1.0 and late.is_floating_point():
                late.copy_(late.flip(position) * (0.5 if call.domains[name] == "unit" else 1.5))
            else:
                late.copy_(junk(late, call.domains[name], math.copysign(size, value)))
        return tensor

    return call.map(change)


@law(needs=("window",), cost="rotated")
def window(s: Subject) -> None:
    """A window wider than the sequence changes nothing; (0, 0) sees the query's own key only."""
    if "window" not in s.options:
        return
    call = s.sample(("key_mask",) if "key_mask" in s.options else ()).to(torch.float64)
    wide = call.size("s") + call.size("t")
    whole = s.run(call)
    for reach in ((-1, -1), (wide, wide), (wide, -1)):
        s.close(s.run(call.with_options(window=reach)), whole, "same", f"window={reach}")
    narrow = call.with_options(window=(0, 0))
    s.close(s.run(narrow), s.reference(narrow), "value", "window=(0, 0)")
