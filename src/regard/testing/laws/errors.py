"""The law about wrong arguments: every one is refused, by the op's name and the argument's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from regard.core.patterns import Pattern
from regard.testing.law import law
from regard.testing.laws.states import advance, wrong_states
from regard.testing.subject import Subject


@law(cost="rotated")
def errors(s: Subject) -> str:
    """Every wrong argument raises ValueError or TypeError naming the op and the argument."""
    count = 0
    for what, argument, arguments in wrong_calls(s):
        count += 1
        try:
            s.card.op(**arguments)
        except (ValueError, TypeError) as error:
            text = str(error)
            s.require(
                text.startswith(s.card.op.__name__),
                f"{what}: the message must start with {s.card.op.__name__!r}, but is {text!r}",
            )
            named = any(re.search(rf"\b{name}\b", text) for name in argument.split("|"))
            s.require(named, f"{what}: the message must name {argument}, but is {text!r}")
        except Exception as error:
            s.broken(f"{what}: raised {type(error).__name__} instead: {error}")
        else:
            s.broken(f"{what}: was accepted")
    return f"{count} wrong calls refused"


def wrong_calls(s: Subject) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What is wrong, the argument(s) that the message may name, and the arguments."""
    base = s.sample().to(torch.float32)
    good, q, k, v = base.arguments, base["q"], base["k"], base["v"]
    B, H, T, _ = q.shape
    Hk, S = k.shape[1], k.shape[2]
    accepts = s.card.accepts

    def wrong(what: str, argument: str, **changed: Any) -> tuple[str, str, dict[str, Any]]:
        return what, argument, {**good, **changed}

    for name in ("q", "k", "v"):
        tensor = good[name]
        yield wrong(f"{name} of rank 3", name, **{name: tensor[0]})
        yield wrong(f"{name} of rank 5", name, **{name: tensor[None]})
        yield wrong(f"{name} a list", name, **{name: tensor.tolist()})
        yield wrong(f"{name} None", name, **{name: None})
        yield wrong(f"{name} an array", name, **{name: tensor.cpu().numpy()})
    integers = {name: good[name].long() for name in ("q", "k", "v")}
    yield wrong("q, k, v of integers", "q", **integers)
    complex_ = {name: good[name].to(torch.complex64) for name in ("q", "k", "v")}
    yield wrong("q, k, v complex", "q", **complex_)
    yield wrong("k of another dtype", "k|q", k=k.double())
    yield wrong("v of another dtype", "v|q", v=v.double())
    yield wrong("k on the meta device", "k|q", k=k.to("meta"))
    yield wrong("v on the meta device", "v|q", v=v.to("meta"))
    yield wrong("k of another batch size", "k|q", k=k[:1])
    yield wrong("v of another batch size", "v|q", v=v[:1])
    yield wrong("k of another head size", "k|q", k=k[..., :-1])
    yield wrong("v of another length", "v|k", v=v[:, :, :-1])
    heads = torch.cat([k] * (H + 1), 1)[:, : H + 1]
    values = torch.cat([v] * (H + 1), 1)[:, : H + 1]
    yield wrong("heads that are no multiple", "q|k", k=heads, v=values)
    yield wrong("no heads", "q|k", q=q[:, :0], k=k[:, :0], v=v[:, :0])
    yield wrong("no channels", "q|k", q=q[..., :0], k=k[..., :0])
    yield wrong("an unknown argument", "no_such_argument", no_such_argument=1)
    if accepts("causal"):
        yield wrong("causal a word", "causal", causal="yes")
        yield wrong("causal a number", "causal", causal=1)
    if accepts("impl"):
        yield wrong("impl unknown", "impl", impl="fastest")
        yield wrong("impl a number", "impl", impl=3)
    if accepts("key_mask"):
        mask = torch.ones(B, S, dtype=torch.bool, device=s.device)
        yield wrong("key_mask of floats", "key_mask", key_mask=mask.float())
        yield wrong("key_mask too long", "key_mask", key_mask=torch.cat([mask, mask], 1))
        yield wrong("key_mask of rank 4", "key_mask", key_mask=mask[:, None, None])
        yield wrong("key_mask a list", "key_mask", key_mask=mask.tolist())
        yield wrong("key_mask on meta", "key_mask", key_mask=mask.to("meta"))
    for name in ("key_bias", "log_decay", "beta"):
        if not accepts(name):
            continue
        fine = -torch.rand(B, Hk, S, device=s.device)
        yield wrong(f"{name} of integers", name, **{name: fine.long()})
        yield wrong(f"{name} too short", name, **{name: fine[..., :-1]})
        yield wrong(f"{name} of rank 2", name, **{name: fine[0]})
        yield wrong(f"{name} of {H + 1} heads", name, **{name: fine[:, :1].expand(B, H + 1, S)})
        yield wrong(f"{name} on meta", name, **{name: fine.to("meta")})
        yield wrong(f"{name} a number", name, **{name: -1.0})
    if accepts("bias"):
        bias = torch.zeros(B, H, T, S, device=s.device)
        yield wrong("bias of another length", "bias", bias=bias[..., :-1])
        yield wrong("bias of booleans", "bias", bias=bias.bool())
        yield wrong("bias on meta", "bias", bias=bias.to("meta"))
    if accepts("scale"):
        for value in ("big", True, [1.0]):
            yield wrong(f"scale {value!r}", "scale", scale=value)
        for value in (math.nan, math.inf):
            yield wrong(f"scale {value}", "scale", scale=value)
        yield wrong("scale of wrong length", "scale", scale=torch.ones(H + 1, device=s.device))
        yield wrong("scale of integers", "scale", scale=torch.ones(H, device=s.device).long())
    if accepts("window"):
        for value in (3, (1, 2, 3), (1.5, 0), (-2, 0), [1, 2], (True, 0), "wide"):
            yield wrong(f"window {value!r}", "window", window=value)
    if accepts("softcap"):
        for value in (0.0, -1.0, math.nan, "soft", True):
            yield wrong(f"softcap {value!r}", "softcap", softcap=value)
    if accepts("cu_seqlens"):
        ends = torch.tensor([0, S], dtype=torch.int32, device=s.device)
        both = {"cu_seqlens": ends} | ({"cu_seqlens_k": ends} if accepts("cu_seqlens_k") else {})
        yield wrong("packed with B > 1", "q|cu_seqlens", **both)
        one = {name: t for name, t in base.rows(torch.tensor([0])).tensors.items()}
        yield wrong("cu_seqlens int64", "cu_seqlens", **one, cu_seqlens=ends.long())
        yield wrong("cu_seqlens a list", "cu_seqlens", **one, cu_seqlens=[0, S])
        yield wrong("cu_seqlens of rank 2", "cu_seqlens", **one, cu_seqlens=ends[None])
        if accepts("cu_seqlens_k"):
            yield wrong("cu_seqlens_k alone", "cu_seqlens_k", **one, cu_seqlens_k=ends)
            both = {"cu_seqlens": ends, "cu_seqlens_k": ends[:1]}
            yield wrong("offsets of two lengths", "cu_seqlens_k", **one, **both)
    for operand in s.card.operands:
        fine = good[operand.name]
        yield wrong(f"{operand.name} None", operand.name, **{operand.name: None})
        more = {operand.name: fine[None]}
        yield wrong(f"{operand.name} of one axis too many", operand.name, **more)
    if s.card.state and accepts("state"):
        yield from _wrong_states(s, wrong)


def _wrong_states(s: Subject, wrong: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for what, value in wrong_states(s):
        yield wrong(f"state {what}", "state", state=value)
    yield wrong("return_state a word", "return_state", return_state="yes")
    if s.pattern is Pattern.CAUSAL_SELF and "T" not in s.case.dims:
        small = s.sample(T=3, S=3, B=3).to(torch.float32)
        _, state = advance(s, small, None)
        yield wrong("state of another batch size", "state|k", state=state, return_state=True)
        if s.card.accepts("cu_seqlens"):
            ends = torch.tensor([0, 3], dtype=torch.int32, device=s.device)
            one = small.rows(torch.tensor([0])).tensors
            # A cache is refused; a state of fixed size must have a row for each sequence.
            yield wrong("packed with another state", "state", **one, cu_seqlens=ends, state=state)
