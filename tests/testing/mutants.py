"""Softmax attention, broken in one way each: what the laws are there to catch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import regard
from regard.core.library import define

MUTANTS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {}


def breaks(*laws: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a mutant: a function of the healthy op and its keyword arguments."""

    def add(mutant: Callable[..., Any]) -> Callable[..., Any]:
        MUTANTS[mutant.__name__] = (laws, mutant)
        return mutant

    return add


def sick(name: str, mechanism: str = "softmax") -> regard.Card:
    """The card of a mechanism whose op has this fault."""
    card = regard.mechanisms[mechanism]
    healthy, mutant = card.op, MUTANTS[name][1]

    @functools.wraps(healthy)
    def op(q=None, k=None, v=None, **arguments):
        return mutant(healthy, q=q, k=k, v=v, **arguments)

    return replace(card, op=op, laws_except={}, cases=card.cases[:1])


def on_output(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)


@breaks("equals_reference", "gradient", "odd_lengths", "value_size")
def slightly_wrong(op, **a):
    return on_output(op(**a), lambda out: out * 1.0001)


@breaks("equals_reference", "deterministic")
def reads_uninitialised_memory(op, **a):
    return on_output(op(**a), lambda out: out + 0.0 * torch.empty_like(out))


@breaks("equals_reference")
def returns_another_dtype(op, **a):
    return on_output(op(**a), lambda out: out.double())


@breaks("forms")
def one_form_differs(op, **a):
    return on_output(op(**a), lambda out: out * (1.001 if a.get("impl") == "reference" else 1.0))


@breaks("forms")
def serves_any_impl(op, **a):
    a["impl"] = a.get("impl", "auto").replace("triton", "auto")
    return op(**a)


@breaks("odd_lengths")
def wrong_at_one_length(op, **a):
    return on_output(op(**a), lambda out: out * (1.001 if out.shape[2] == 33 else 1.0))


@breaks("empty")
def no_gradient_without_keys(op, **a):
    return on_output(op(**a), lambda out: out if a["k"].shape[2] else torch.zeros_like(out))


@breaks("empty")
def fails_without_batch(op, **a):
    a["q"].amax()
    return op(**a)


@breaks("query_key_lengths")
def aligned_at_the_start(op, **a):
    T, S = a["q"].shape[2], a["k"].shape[2]
    if a.get("causal") and a.get("state") is None and T < S:
        a = a | {"key_mask": (torch.arange(S, device=a["k"].device) < T).expand(len(a["q"]), S)}
    return op(**a) if T == S or not a.get("causal") else on_output(op(**a), lambda o: o.flip(2))


@breaks("value_size")
def needs_equal_sizes(op, **a):
    if a["v"].shape[3] != a["k"].shape[3]:
        raise ValueError("softmax_attention: v must be of k's size")
    return op(**a)


@breaks("grouped_queries", "equals_reference")
def heads_repeated_in_the_wrong_order(op, **a):
    group = a["q"].shape[1] // a["k"].shape[1]
    return op(**a | {name: a[name].repeat(1, group, 1, 1) for name in "kv"})


@breaks("padding", "masked_junk", "no_keys", "equals_reference")
def ignores_the_key_mask(op, **a):
    return op(**a | {"key_mask": None})


@breaks("masked_junk")
def multiplies_junk_by_zero(op, **a):
    return on_output(op(**a), lambda out: out + 0.0 * a["v"].sum())


@breaks("no_keys")
def averages_where_nothing_is_seen(op, **a):
    blind = ~a["key_mask"].any(1) if a.get("key_mask") is not None else None
    if blind is None:
        return op(**a)
    return on_output(op(**a), lambda out: out + blind[:, None, None, None] * 1.0)


@breaks("no_leak")
def centres_keys_on_a_mean_that_contains_the_future(op, **a):
    if a.get("state") is None and a["k"].shape[2]:  # mathematically, nothing changes
        a = a | {"k": a["k"] - a["k"].mean(2, keepdim=True)}
    return op(**a)


@breaks("no_leak")
def normalises_over_queries(op, **a):
    return on_output(op(**a), lambda out: out * (1 + 1e-9 * a["q"].square().sum()))


@breaks("window", "equals_reference")
def window_off_by_one(op, **a):
    window = a.get("window")
    if window is not None and window[0] >= 0:
        a["window"] = (window[0] + 1, window[1])
    return op(**a)


@breaks("no_leak_forms")
def one_form_leaks(op, **a):
    return normalises_over_queries(op, **a) if a.get("impl") == "reference" else op(**a)


@breaks("masked_junk_forms")
def one_form_multiplies_junk_by_zero(op, **a):
    total = a["v"].sum() if a.get("impl") == "reference" else 0.0
    return on_output(op(**a), lambda out: out + 0.0 * total)


@breaks("masked_junk_forms", "masked_junk")
def multiplies_masked_biases_by_zero(op, **a):
    given = [a[name] for name in ("log_decay", "key_bias") if a.get(name) is not None]
    return on_output(op(**a), lambda out: out + sum(0.0 * t.sum() for t in given))


@breaks("scalar_tensors")
def takes_no_scale_of_no_axes(op, **a):
    if isinstance(a.get("scale"), Tensor):
        a["scale"] = a["scale"][:, None][:, 0]
    return op(**a)


@breaks("tiling")
def wrong_in_blocks_of_a_chosen_size(op, **a):
    return on_output(op(**a), lambda out: out * (1.01 if a.get("block_size") else 1.0))


@breaks("tiling")
def gradient_wrong_in_blocks_of_a_chosen_size(op, **a):
    return op(**a | {"k": _Scaled.apply(a["k"], 0.99)} if a.get("block_size") else a)


@breaks("long")
def wrong_beyond_a_chunk(op, **a):
    def change(out):
        return torch.cat([out[:, :, :256], out[:, :, 256:] * 1.01], 2)

    return on_output(op(**a), change)


@breaks("long")
def leaks_in_long_sequences(op, **a):
    return normalises_over_queries(op, **a) if a["q"].shape[2] >= 140 else op(**a)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@breaks("gradient", "gradcheck")
def gradient_slightly_wrong(op, **a):
    return op(**a | {"k": _Scaled.apply(a["k"], 0.999)})


@breaks("gradient_subsets", "gradcheck")
def forgets_keys_unless_values_ask(op, **a):
    if not a["v"].requires_grad or (a["k"].requires_grad and not a["q"].requires_grad):
        a["k"] = _Scaled.apply(a["k"], 0.5)
    elif torch.is_grad_enabled():
        a["k"] = _Scaled.apply(a["k"], 0.9)
    return op(**a)


@breaks("decode", "decode_gradient", "crop", "select", "cached_memory")
def wrong_after_a_state(op, **a):
    return on_output(op(**a), lambda out: out * (1.001 if a.get("state") is not None else 1.0))


@breaks("decode_optional_operands")
def fills_missing_masks_with_the_wrong_value(op, **a):
    state = a.get("state")
    if state is not None and state.key_mask is not None and a.get("key_mask") is None:
        mask = torch.zeros(a["k"].shape[0], a["k"].shape[2], dtype=torch.bool)
        a["key_mask"] = mask.to(a["k"].device)
    return op(**a)


@breaks("decode_gradient")
def cuts_the_gradient_at_the_state(op, **a):
    state = a.get("state")
    return op(**a | {"state": state and state.map(lambda t: t.detach())})


@breaks("older_state")
def writes_into_the_past(op, **a):
    result, state = op(**a), a.get("state")
    if state is not None and not a["k"].requires_grad and state.length:
        state.k[..., 0] += 1.0
    return result


@breaks("continue_twice")
def forks_without_a_word(op, **a):
    state = a.get("state")
    return op(**a | {"state": state and state.fork()})


@breaks("save_load", "state_map")
def notices_where_a_state_comes_from(op, **a):
    state = a.get("state")
    strange = state is not None and state._buffers.capacity == state.length and state.length == 5
    return on_output(op(**a), lambda out: out * (1.001 if strange else 1.0))


@breaks("packed")
def ignores_packing(op, **a):
    return op(**a | {"cu_seqlens": None, "cu_seqlens_k": None})


@breaks("packed")
def ignores_how_keys_are_packed(op, **a):
    same = a["q"].shape[2] == a["k"].shape[2]
    return op(**a | {"cu_seqlens_k": None} if same else a)


@breaks("noncontiguous")
def reads_by_pointer(op, **a):
    q = a["q"]
    strides = torch.empty(q.shape, device="meta").stride()
    return op(**a | {"q": q if q.requires_grad else torch.as_strided(q, q.shape, strides)})


@breaks("inputs_unmodified")
def writes_into_an_argument(op, **a):
    result = op(**a)
    with torch.no_grad():
        a["k"].mul_(1.0)
    return result


@breaks("inputs_unmodified")
def returns_an_argument(op, **a):
    return on_output(op(**a), lambda out: a["v"].view_as(a["v"]))


@breaks("batch_invariance")
def depends_on_the_batch(op, **a):
    return on_output(op(**a), lambda out: out * (1.0 + 1e-3 * out.shape[0]))


@breaks("deterministic", "random_state")
def rolls_dice(op, **a):
    return on_output(op(**a), lambda out: out + 1e-6 * torch.randn_like(out))


@breaks("random_state")
def seeds_the_world(op, **a):
    torch.manual_seed(0)
    return op(**a)


@breaks("bfloat16", "float16")
def sums_in_half_precision(op, **a):
    half = a["q"].dtype in (torch.bfloat16, torch.float16)
    return on_output(op(**a), lambda out: out * 1.01 if half else out)


@breaks("autocast")
def ignores_autocast(op, **a):
    with torch.autocast(a["q"].device.type, enabled=False):
        return op(**a)


@breaks("inference_mode")
def counts_versions(op, **a):
    a["q"]._version  # noqa: B018  (inference tensors have none)
    return op(**a)


@breaks("meta", "compile", "export")
def looks_at_values(op, **a):
    big = float(a["q"].detach().abs().sum()) > 1e6
    return on_output(op(**a), lambda out: out * 2 if big else out)


_wrong_fake = define(
    "test_wrong_fake", "(Tensor x) -> Tensor", lambda x: x.clone(), lambda x: x.new_empty(1)
)


@breaks("opcheck")
def declares_the_wrong_shape(op, **a):
    _wrong_fake(a["q"].detach())
    return op(**a)


@breaks("errors")
def raises_something_else(op, **a):
    try:
        return op(**a)
    except ValueError as error:
        raise RuntimeError(str(error)) from error


@breaks("errors")
def casts_a_wrong_mask(op, **a):
    if isinstance(a.get("key_mask"), Tensor):
        a["key_mask"] = a["key_mask"].bool()
    return op(**a)


@breaks("errors")
def does_not_say_who_complains(op, **a):
    try:
        return op(**a)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).split(": ")[-1]) from error


@breaks("memory")
def holds_the_scores(op, **a):
    (a["q"] @ a["k"].repeat_interleave(a["q"].shape[1] // a["k"].shape[1], 1).mT).amax()
    return op(**a)


def dense_attention(q, k, v, *, causal=False):
    """What a card must not call linear: it holds all scores, where no operator of torch shows it.

    An importable function, as the law starts a process of its own.
    """
    scores = bytearray(q.shape[2] * k.shape[2] * 4)
    scores[::4096] = bytes(len(scores[::4096]))
    return regard.ops.softmax_attention(q, k, v, causal=causal)
