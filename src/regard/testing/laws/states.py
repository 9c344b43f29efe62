"""Laws about states: a call cut in two gives what it gives whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core.patterns import Pattern
from regard.core.state import FixedState, State, load_state
from regard.testing.calls import OPTIONAL, Call
from regard.testing.law import law
from regard.testing.subject import Subject

CAUSAL = (Pattern.CAUSAL_SELF,)
CROSS = (Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS)
KINDS = ("cache", "fixed")


def advance(s: Subject, call: Call, state: Any) -> tuple[Tensor, State]:
    """One call from `state` on, checked to return an output and a state."""
    result = s.run(call, state=state, return_state=True)
    pair = isinstance(result, tuple) and len(result) == 2
    s.require(pair and isinstance(result[1], State), "return_state=True must give (out, State)")
    return result


def in_steps(s: Subject, call: Call, cuts: tuple[int, ...]) -> tuple[Tensor, State]:
    """The call cut at these tokens, each part continuing the state of the one before."""
    ends = (0, *cuts, call.size("t"))
    outputs, state = [], None
    for start, stop in pairwise(ends):
        out, state = advance(s, call.narrow("ts", start, stop), state)
        outputs.append(out)
    assert state is not None
    return torch.cat(outputs, 2), state


def sample(s: Subject, options: tuple[str, ...], **extra: Any) -> Call:
    """A call whose operands can be cut by token."""
    s.free_lengths()
    return s.sample(tuple(o for o in options if o != "bias"), T=9, S=9, **extra)


def for_options(
    function: Callable[[Subject, tuple[str, ...]], None],
) -> Callable[[Subject], None]:
    """A law that is applied once per set of options."""

    @wraps(function)
    def over_options(s: Subject) -> None:
        for options in s.some_options(("bias",)):
            function(s, options)

    return over_options


@law(needs=("state", "return_state"), states=KINDS, patterns=CAUSAL, cost="costly")
def decode(s: Subject) -> None:
    """Prefill and decode equal the parallel call at every split, operands given per call."""
    sets = s.option_sets(("bias",)) if s.thorough else s.some_options(("bias",))
    for options in sets:
        for forget in (False, True) if "log_decay" in options else (False,):
            call = sample(s, options, forget=forget)
            T = call.size("t")
            plans = [(n,) for n in range(T + 1)]
            plans += [tuple(range(1, T)), (1, 4, 6), (2, 2, 5), (T - 1, T - 1)]
            for dtype in (torch.float64, torch.float32):
                typed = call.to(dtype)
                whole = s.run(typed)
                for cuts in plans:
                    what = f"cut at {list(cuts)}, options {options}"
                    with torch.no_grad():
                        out, state = in_steps(s, typed, cuts)
                    s.close(out, whole, "same", what)
                    s.require(state.length == T, f"{what}: the state's length is {state.length}")


@law(needs=("state", "return_state"), states=KINDS, patterns=CAUSAL, cost="rotated")
def decode_optional_operands(s: Subject) -> None:
    """An operand that only some of the calls bring is neutral in the others."""
    names = [name for name in ("key_mask", "key_bias", "log_decay") if name in s.options]
    for name in names:
        call = sample(s, (name,)).to(torch.float64)
        T = call.size("t")
        for first in (True, False):
            part = slice(5, None) if first else slice(None, 5)
            neutral = call[name].clone()
            neutral[..., part] = name == "key_mask"
            whole = s.run(call.with_tensor(name, neutral, call.axes[name]))
            head, tail = call.narrow("ts", 0, 5), call.narrow("ts", 5, T)
            head, tail = (head, tail.without(name)) if first else (head.without(name), tail)
            one, state = advance(s, head, None)
            two, _ = advance(s, tail, state)
            which = "first" if first else "second"
            what = f"{name} in the {which} call only"
            s.close(torch.cat([one, two], 2), whole, "same", what)


@law(needs=("state", "return_state"), states=KINDS, patterns=CAUSAL, cost="rotated")
def decode_gradient(s: Subject) -> None:
    """Gradients pass through a state as through the parallel call."""
    for options in s.some_options(("bias",)):
        call = sample(s, options)
        for dtype in (torch.float64, torch.float32):
            _, expected = s.gradients(call.to(dtype))
            for cuts in ((3,), (1, 2, 8)):
                _, actual = s.gradients(
                    call.to(dtype), function=lambda c, cuts=cuts: in_steps(s, c, cuts)[0]
                )
                s.close_all(call, actual, expected, "gradient", f"cut at {cuts}, {options}", dtype)


@law(needs=("state", "return_state"), states=KINDS, patterns=CROSS, cost="rotated")
def cached_memory(s: Subject) -> None:
    """Queries that come later see the memory that a state keeps, without bringing new keys."""
    for options in s.some_options(("bias", "window")):
        call = s.sample(tuple(o for o in options if o not in ("bias", "window"))).to(torch.float64)
        T, S = call.size("t"), call.size("s")
        whole = s.run(call)
        out, state = advance(s, call.narrow("t", 0, 1), None)
        outputs = [out]
        for t in range(1, T):
            later = call.narrow("t", t, t + 1).narrow("s", S, S)
            out, state = advance(s, later, state)
            outputs.append(out)
        s.close(torch.cat(outputs, 2), whole, "same", f"query by query, options {options}")


@law(needs=("state", "return_state"), states=KINDS, patterns=CAUSAL, cost="rotated")
@for_options
def older_state(s: Subject, options: tuple[str, ...]) -> None:
    """A state stays what it was when others were made from it, and is never written to."""
    call = sample(s, options).to(torch.float32)
    T = call.size("t")
    _, state = advance(s, call.narrow("ts", 0, 4), None)
    before = _copy(state)
    expected, _ = advance(s, call.narrow("ts", 4, 6), state.fork())
    _, longer = advance(s, call.narrow("ts", 4, 6), state)
    _, longest = advance(s, call.narrow("ts", 6, T), longer)
    s.require((state.length, longer.length, longest.length) == (4, 6, T), "lengths are mixed up")
    for name, tensor in _copy(state).items():
        s.identical(tensor, before[name], f"{name} of a state that was continued")
    again, _ = advance(s, call.narrow("ts", 4, 6), state.fork())
    s.identical(again, expected, "the continuation of a fork of an older state")


@law(needs=("state", "return_state"), states=KINDS, patterns=CAUSAL, cost="rotated")
@for_options
def continue_twice(s: Subject, options: tuple[str, ...]) -> None:
    """A cache continued twice raises unless forked; a fixed-size state may be continued freely."""
    call = sample(s, options).to(torch.float32)
    first, second = call.narrow("ts", 4, 7), call.narrow("ts", 5, 8)
    _, state = advance(s, call.narrow("ts", 0, 4), None)
    fork = state.fork()
    one, _ = advance(s, first, state)
    if s.card.state == "cache":
        try:
            s.run(second, state=state, return_state=True)
        except ValueError as error:
            text = str(error)
            named = text.startswith(s.card.op.__name__) and "state" in text and "fork" in text
            s.require(named, f"continuing twice raises without naming op, state and fork: {text}")
        else:
            s.broken("a cache was continued twice without a word")
    else:
        again, _ = advance(s, first, state)
        s.identical(again, one, "the second continuation of one state")
    two, _ = advance(s, second, fork)
    tail = call.narrow("ts", 0, 4).join(second, "ts")
    s.close(two, s.run(tail)[:, :, 4:], "same", "the continuation of a fork")


@law(needs=("state", "return_state"), states=KINDS, patterns=CAUSAL, cost="rotated")
@for_options
def crop(s: Subject, options: tuple[str, ...]) -> None:
    """A cropped state is the state of that moment; a fixed-size one refuses what it forgot."""
    call = sample(s, options).to(torch.float32)
    T = call.size("t")
    _, state = in_steps(s, call, (3, 5))
    if s.card.state == "fixed":
        s.require(state.crop(T).length == T, "crop to the full length")
        for length in (0, T - 1, T + 1):
            _refuses(s, lambda length=length: state.crop(length), f"crop({length})")
        return
    for length in (0, 2, 5, T):
        cut = state.crop(length)
        s.require(cut.length == length, f"crop({length}) has length {cut.length}")
        rest = call.narrow("ts", 2, 6)
        out, _ = advance(s, rest, cut)
        joined = call.narrow("ts", 0, length).join(rest, "ts")
        s.close(out, s.run(joined)[:, :, length:], "same", f"after crop({length})")
    lengths: tuple[Any, ...] = (-1, T + 1, 2.0)
    for length in lengths:
        _refuses(s, lambda length=length: state.crop(length), f"crop({length})")
    again, _ = advance(s, call.narrow("ts", 2, 6), state)
    longer = call.join(call.narrow("ts", 2, 6), "ts")
    s.close(again, s.run(longer)[:, :, T:], "same", "the state that was cropped, continued itself")


@law(needs=("state", "return_state"), states=KINDS, patterns=CAUSAL, cost="rotated")
@for_options
def select(s: Subject, options: tuple[str, ...]) -> None:
    """Rows of a state may be reordered, repeated and dropped."""
    call = sample(s, options, B=3).to(torch.float32)
    T = call.size("t")
    _, state = advance(s, call.narrow("ts", 0, 5), None)
    whole = s.run(call)[:, :, 5:]
    for index in ([2, 0, 1], [1, 1, 1, 0], [2]):
        rows = torch.tensor(index)
        out, _ = advance(s, call.narrow("ts", 5, T).rows(rows), state.select(rows))
        s.close(out, whole.index_select(0, rows.to(whole.device)), "same", f"select({index})")


@law(needs=("state", "return_state"), states=KINDS, patterns=CAUSAL, cost="rotated")
@for_options
def state_map(s: Subject, options: tuple[str, ...]) -> None:
    """A state may be detached, and a cache continued in another dtype."""
    call = sample(s, options)
    T = call.size("t")
    first, rest = call.narrow("ts", 0, 5), call.narrow("ts", 5, T)
    leaves = first.to(torch.float32).leaves()
    _, state = advance(s, leaves, None)
    free = state.map(lambda tensor: tensor.detach())
    s.require(not any(t.requires_grad for t in _tensors(free).values()), "detach left a gradient")
    expected, _ = advance(s, rest.to(torch.float32), free.fork())
    if s.card.state == "fixed":
        same = free.map(lambda tensor: tensor.double())
        kept = {n: t.dtype for n, t in _tensors(same).items()}
        s.require(
            kept == {n: t.dtype for n, t in _tensors(free).items()}, "accumulators changed dtype"
        )
        out, _ = advance(s, rest.to(torch.float32), same)
        s.identical(out, expected, "after map(double)")
        return
    # The sampled values are exact in float32, so the widened cache is the float64 cache; only
    # its keys and values are widened, and the new operands keep to the state's dtype as well.
    rest = rest.to(torch.float32).map(
        lambda name, t: t.double() if name not in OPTIONAL and t.is_floating_point() else t
    )
    out, _ = advance(s, rest, free.map(lambda tensor: tensor.double()))
    s.close(out, s.run(call.to(torch.float64))[:, :, 5:], "same", "after map(double)")


@law(needs=("state", "return_state"), states=KINDS, patterns=CAUSAL, cost="rotated")
@for_options
def save_load(s: Subject, options: tuple[str, ...]) -> None:
    """A saved state goes on where it was, bit for bit."""
    call = sample(s, options).to(torch.float32)
    T = call.size("t")
    _, state = in_steps(s, call.narrow("ts", 0, 5), (2,))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        state.save(path)
        loaded = load_state(path, device=s.device)
    s.require(type(loaded) is type(state) and loaded.length == 5, "another state was loaded")
    for name, tensor in _tensors(state).items():
        s.identical(_tensors(loaded)[name], tensor, f"{name} of the loaded state")
    expected, _ = advance(s, call.narrow("ts", 5, T), state)
    out, _ = advance(s, call.narrow("ts", 5, T), loaded)
    s.identical(out, expected, "the continuation of a loaded state")


def _tensors(state: State) -> dict[str, Tensor]:
    return state._pack()[0]


def _copy(state: State) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in _tensors(state).items()}


def _refuses(s: Subject, action: Any, what: str) -> None:
    try:
        action()
    except (ValueError, TypeError):
        return
    s.broken(f"{what} was not refused")


def wrong_states(s: Subject) -> list[tuple[str, Any]]:
    """Objects that are no state of this op."""
    others: list[tuple[str, Any]] = [("a tensor", torch.zeros(2)), ("a word", "state")]
    if s.card.state == "cache":
        others.append(("a fixed-size state", FixedState("other", 3, {})))
    else:
        others.append(("another mechanism's state", FixedState("other", 3, {})))
    return others
