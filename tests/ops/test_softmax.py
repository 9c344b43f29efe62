"""Exact attention: equal to its equations in every form, and safe where others are not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import regard
from regard.core.budgets import budget, relative_error
from regard.core.cache import KVCache
from regard.core.state import load_state
from regard.ops.softmax import SoftmaxAux, softmax_attention
from regard.ops.softmax.card import card
from regard.ops.softmax.reference import softmax_reference

INF = float("inf")
FORMS = ("native", "eager", "reference")


def tensors(
    seed: int = 0,
    *,
    B: int = 2,
    H: int = 4,
    Hk: int = 2,
    T: int = 7,
    S: int = 7,
    D: int = 4,
    Dv: int = 3,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, D), (B, Hk, S, D), (B, Hk, S, Dv))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def operands(seed: int, q: Tensor, k: Tensor) -> dict[str, Any]:
    """One value of every optional operand, on a random number of heads where that is free."""
    (B, H, T, _), (Hk, S) = q.shape, k.shape[1:3]
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    decay = -torch.rand(B, choose.choice((1, Hk, H)), S, generator=generator, dtype=torch.float64)
    decay[torch.rand(decay.shape, generator=generator) < 0.15] = -INF
    bias = normal(choose.choice((1, B)), choose.choice((1, H)), T, S)
    bias[torch.rand(bias.shape, generator=generator) < 0.15] = -INF
    return {
        "causal": choose.random() < 0.6,
        "scale": choose.choice((0.7, normal(H))),
        "key_mask": torch.rand(B, S, generator=generator) < 0.7,
        "key_bias": normal(B, choose.choice((1, Hk, H)), S),
        "bias": choose.choice((bias, bias[:, :, :1], bias[0, 0])),
        "log_decay": decay,
        "softcap": 1.5,
        "sinks": normal(H),
        "window": choose.choice(((2, 1), (-1, 0), (3, -1), (0, 0))),
    }


def some_operands(seed: int, q: Tensor, k: Tensor, share: float = 0.4) -> dict[str, Any]:
    choose = random.Random(seed)
    return {n: x for n, x in operands(seed, q, k).items() if choose.random() < share}


def differentiable(inputs: tuple[Tensor, ...], options: dict[str, Any]) -> list[Tensor]:
    """Fresh leaves in place of every floating-point tensor of a call, in `options` too."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    for name, value in options.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            options[name] = value.detach().clone().requires_grad_()
            leaves.append(options[name])
    return leaves


def serving(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[str, ...]:
    return regard.explain(softmax_attention, q, k, v, **options).available


# --- against the equations ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_every_form_equals_the_equations(seed: int) -> None:
    choose = random.Random(seed)
    H, Hk = choose.choice(((4, 2), (3, 1), (2, 2)))
    T, S = choose.choice(((7, 7), (5, 9), (9, 5), (1, 6), (6, 1), (33, 33)))
    q, k, v = tensors(seed, H=H, Hk=Hk, T=T, S=S, Dv=choose.choice((3, 4, 6)))
    options = some_operands(seed, q, k, share=choose.choice((0.15, 0.4, 1.0)))

    expected_leaves = differentiable((q, k, v), expected_options := dict(options))
    expected, expected_lse = softmax_reference(
        *expected_leaves[:3], **expected_options, return_aux=True
    )
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = torch.autograd.grad((expected * weight).sum(), expected_leaves)

    forms = serving(q, k, v, **options)
    assert "eager" in forms
    for impl in forms:
        leaves = differentiable((q, k, v), form_options := dict(options))
        out = softmax_attention(*leaves[:3], **form_options, impl=impl)
        assert relative_error(out, expected) < budget(torch.float64)
        found = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
        for leaf, got, want in zip(leaves, found, gradients, strict=True):
            got = torch.zeros_like(leaf) if got is None else got
            assert relative_error(got, want) < budget(torch.float64, "gradient"), impl
    _, aux = softmax_attention(q, k, v, **options, return_aux=True)
    assert torch.equal(aux.lse == -INF, expected_lse == -INF)
    finite = aux.lse > -INF
    assert relative_error(aux.lse[finite], expected_lse[finite]) < budget(torch.float64)


def test_the_reference_is_the_textbook_formula_entry_by_entry() -> None:
    q, k, v = tensors(B=1, H=1, Hk=1, T=3, S=4)
    log_decay = torch.tensor([[[-0.5, -0.25, -INF, -1.0]]], dtype=torch.float64)
    sink, cap = torch.tensor([0.3], dtype=torch.float64), 2.0
    out = softmax_reference(
        q, k, v, causal=True, scale=0.5, log_decay=log_decay, softcap=cap, sinks=sink
    )
    steps = log_decay[0, 0]
    for i in range(3):
        position = i + 1
        scores = {
            j: cap * torch.tanh(0.5 * (q[0, 0, i] @ k[0, 0, j]) / cap)
            + sum((steps[m] for m in range(j + 1, position + 1)), torch.tensor(0.0).double())
            for j in range(position + 1)
        }
        total = sink[0].exp() + sum(score.exp() for score in scores.values())
        row = sum(scores[j].exp() / total * v[0, 0, j] for j in scores)
        assert torch.allclose(out[0, 0, i], row, rtol=1e-13, atol=0)


@pytest.mark.parametrize("impl", ["native", "eager"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_where_torch_is_defined(impl: str, causal: bool) -> None:
    q, k, v = tensors(T=33, S=33, Dv=4, dtype=torch.float32)
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    out = softmax_attention(q, k, v, causal=causal, impl=impl)
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("impl", ["native", "eager"])
def test_float32_and_bfloat16_stay_in_their_budget(impl: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.requires_grad_() for x in tensors(T=40, S=50, D=16, Dv=16, dtype=dtype))
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.8
        out = softmax_attention(q, k, v, causal=True, key_mask=mask, impl=impl)
        expected = softmax_reference(*exact, causal=True, key_mask=mask)
        assert out.dtype == dtype
        assert relative_error(out, expected) < budget(dtype)
        got = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        want = torch.autograd.grad(expected.square().sum(), exact)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < budget(dtype, "gradient")


def test_long_decays_keep_float32_scores_exact() -> None:
    S = 20_000
    q, k, v = tensors(B=1, H=1, Hk=1, T=4, S=S, dtype=torch.float32)
    log_decay = -torch.rand(1, 1, S, generator=torch.Generator().manual_seed(0))
    out = softmax_attention(q, k, v, causal=True, log_decay=log_decay)
    expected = softmax_reference(
        q.double(), k.double(), v.double(), causal=True, log_decay=log_decay.double()
    )
    assert relative_error(out, expected) < budget(torch.float32)


def test_decay_is_the_bias_it_says() -> None:
    q, k, v = tensors(T=6, S=6)
    decay = -torch.rand(2, 2, 6, dtype=torch.float64)
    sums = decay.cumsum(2).repeat_interleave(2, 1)
    bias = sums[:, :, :, None] - sums[:, :, None, :]
    out = softmax_attention(q, k, v, causal=True, log_decay=decay)
    assert relative_error(out, softmax_attention(q, k, v, causal=True, bias=bias)) < 1e-13
    # Without the mask every query stands at the last key: the row's constant cancels.
    out = softmax_attention(q, k, v, log_decay=decay)
    assert relative_error(out, softmax_attention(q, k, v, key_bias=-decay.cumsum(2))) < 1e-13


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_eager_is_differentiable_twice(share: float) -> None:
    q, k, v = tensors(B=1, T=4, S=5, H=2, Hk=1, D=2, Dv=2)
    options = some_operands(3, q, k, share) | {"causal": True, "window": None}
    if "log_decay" in options:  # a difference quotient needs finite decays below 0
        options["log_decay"] = options["log_decay"].clamp(min=-1.0) - 0.1
        options["bias"] = options["bias"].clamp(min=-1.0)
    names = [n for n, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()]
    leaves = differentiable((q, k, v), options)

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        changed = options | dict(zip(names, rest, strict=True))
        return softmax_attention(q, k, v, **changed, block_size=3, impl="eager")

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_the_fused_kernel_refuses_a_second_derivative() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = softmax_attention(q, k, v, impl="native")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented|derivative"):
        torch.autograd.grad(first.sum(), q)


# --- what a query does not see --------------------------------------------------------------


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("options", [{}, {"window": (3, 2)}, {"key_mask": True}, {"softcap": 2.0}])
@pytest.mark.parametrize(("T", "S"), [(12, 12), (5, 12), (12, 9)])
def test_the_future_changes_no_bit(impl: str, options: dict[str, Any], T: int, S: int) -> None:
    options = dict(options)
    q, k, v = tensors(T=T, S=S, D=8, Dv=8, dtype=torch.float32)
    if "key_mask" in options:
        options["key_mask"] = torch.arange(S).expand(2, S) != torch.tensor([[0], [3]])
    if impl not in serving(q, k, v, causal=True, **options):
        return
    seen = max(5, S - T + 2)  # keys; the queries that see no more are the first `rows`
    rows = seen + T - S

    def run(largest: float | None) -> list[Tensor]:
        k2, v2 = k.clone(), v.clone()
        if largest is not None:
            junk = torch.tensor([largest, -largest, 1e4, -1.0]).repeat(3)[: S - seen, None]
            k2[:, :, seen:], v2[:, :, seen:] = junk, -junk
        leaves = [x.clone().requires_grad_() for x in (q, k2, v2)]
        out = softmax_attention(*leaves, causal=True, **options, impl=impl)[:, :, :rows]
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        return [out, *gradients]

    clean = run(None)
    assert all(x.isfinite().all() for x in clean)
    for largest in (1e4, 1e30):
        for a, b in zip(clean, run(largest), strict=True):
            assert torch.equal(a, b), largest
    if impl == "eager":  # the later rows' own scores overflow: their 0 gradients are NaN
        assert torch.equal(clean[0], run(3e38)[0])


def test_future_biases_and_decays_change_no_bit() -> None:
    q, k, v = tensors(T=9, S=9, dtype=torch.float32)
    key_bias, decay, bias = torch.randn(2, 2, 9), -torch.rand(2, 1, 9), torch.randn(9, 9)
    junk = [key_bias.clone(), decay.clone(), bias.clone()]
    junk[0][..., 4:], junk[1][..., 4:] = 1e30, -INF
    junk[2][:, 4:], junk[2][:4, 4:] = 1e30, torch.nan
    results = []
    for a, b, c in ((key_bias, decay, bias), junk):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, a, b, c)]
        names = dict(zip(("key_bias", "log_decay", "bias"), leaves[3:], strict=True))
        out = softmax_attention(*leaves[:3], causal=True, **names)[:, :, :4]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_reach_nothing(impl: str, causal: bool) -> None:
    q, k, v = tensors(T=8, S=8, Dv=4)
    key_mask = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 0, 0]]).bool()
    extras = {} if impl == "native" else {"key_bias": torch.randn(2, 1, 8).double()}
    if extras:
        extras["log_decay"] = -torch.rand(2, 2, 8).double()
    clean = [x.requires_grad_() for x in (q, k, v, *extras.values())]
    dirty = [q.detach().clone()]
    for x in (k, v, *extras.values()):
        hidden = ~key_mask[:, None, :, None] if x.dim() == 4 else ~key_mask[:, None]
        dirty.append(x.detach().masked_fill(hidden, torch.nan))
    dirty = [x.requires_grad_() for x in dirty]
    results = []
    for leaves in (clean, dirty):
        named = dict(zip(extras, leaves[3:], strict=True))
        out = softmax_attention(*leaves[:3], causal=causal, key_mask=key_mask, **named, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    # And they are as good as absent.
    row = key_mask[1]
    alone = softmax_attention(q[1:, :, row], k[1:, :, row], v[1:, :, row], causal=causal)
    if impl == "native":
        assert relative_error(results[0][0][1:, :, row], alone) < 1e-12


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (1, 1)])
def test_rows_without_keys_are_zero(impl: str, causal: bool, window: Any) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(T=7, S=4, Dv=4))
    key_mask = torch.tensor([[False] * 4, [False, True, True, True]])
    out = softmax_attention(q, k, v, causal=causal, window=window, key_mask=key_mask, impl=impl)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (out[0] == 0).all()
    assert all((g[0] == 0).all() and g.isfinite().all() for g in gradients)
    if causal:
        assert (out[:, :, :4] == 0).all()
    assert (out[1, :, -2:] != 0).all()


def test_rows_without_keys_have_no_log_sum_and_keep_sinks_harmless() -> None:
    q, k, v = tensors(T=3, S=2)
    sinks = torch.tensor([0.0, -INF, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    key_mask = torch.tensor([[False, False], [True, True]])
    out, aux = softmax_attention(q, k, v, sinks=sinks, key_mask=key_mask, return_aux=True)
    assert isinstance(aux, SoftmaxAux)
    assert aux.lse.shape == (2, 4, 3)
    assert (aux.lse[0] == -INF).all()
    (gradient,) = torch.autograd.grad(out.square().sum(), sinks)
    assert gradient.isfinite().all()
    assert gradient[1] == 0
    plain = softmax_attention(q, k, v, key_mask=key_mask, impl="eager")
    assert torch.equal(out[:, 1], plain[:, 1])
    assert (out[0] == 0).all()


# --- one length after another ---------------------------------------------------------------


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("splits", [(1, 6), (4, 2, 1), (0, 7), (3, 0, 4)])
def test_decoding_equals_the_parallel_call(impl: str, splits: tuple[int, ...]) -> None:
    q, k, v = tensors()
    given = operands(5, q, k)
    keys = ("key_mask", "key_bias", "log_decay")
    whole = {n: given[n] for n in ("softcap", "sinks", "scale")} | {"causal": True}
    cut: dict[str, Any] = {n: given[n] for n in keys}
    if impl == "native":
        whole, cut = {"causal": True, "window": (3, 0)}, {"key_mask": given["key_mask"]}
    expected = softmax_attention(q, k, v, **whole, **cut, impl=impl)
    state, outputs, start = None, [], 0
    for length in splits:
        now = slice(start, start + length)
        out, state = softmax_attention(
            q[:, :, now], k[:, :, now], v[:, :, now], **whole,
            **{n: x[:, now] if n == "key_mask" else x[:, :, now] for n, x in cut.items()},
            state=state, return_state=True, impl=impl,
        )  # fmt: skip
        outputs.append(out)
        start += length
    assert state is not None
    assert state.length == 7
    assert relative_error(torch.cat(outputs, 2), expected) < budget(torch.float64, "same")


def test_operands_may_begin_in_the_middle_and_bias_covers_all_keys() -> None:
    q, k, v = tensors()
    decay, bias = -torch.rand(2, 1, 3).double(), torch.randn(7, 7).double()
    _, state = softmax_attention(
        q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True, return_state=True
    )
    late = softmax_attention(
        q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], causal=True, log_decay=decay, bias=bias[4:],
        state=state,
    )  # fmt: skip
    decay = pad(decay, (4, 0))
    whole = softmax_attention(q, k, v, causal=True, log_decay=decay, bias=bias)
    assert relative_error(late, whole[:, :, 4:]) < 1e-13


def test_states_fork_crop_select_and_survive_a_file(tmp_path: Any) -> None:
    q, k, v = tensors()
    decay = -torch.rand(2, 4, 7).double()

    def step(state: KVCache | None, now: slice, rows: Any = slice(None)) -> Any:
        return softmax_attention(
            q[rows, :, now], k[rows, :, now], v[rows, :, now], causal=True,
            log_decay=decay[rows, :, now], state=state, return_state=True,
        )  # fmt: skip

    whole = softmax_attention(q, k, v, causal=True, log_decay=decay)
    _, state = step(None, slice(0, 5))
    same = budget(torch.float64, "same")
    state.save(tmp_path / "state.safetensors")
    restored = load_state(tmp_path / "state.safetensors")
    for candidate in (state.fork(), restored):
        assert relative_error(step(candidate, slice(5, 7))[0], whole[:, :, 5:]) < same
    assert relative_error(step(state.crop(3), slice(3, 7))[0], whole[:, :, 3:]) < same
    swapped, _ = step(state.select(torch.tensor([1, 0])), slice(5, 7), [1, 0])
    assert relative_error(swapped, whole[[1, 0], :, 5:]) < same
    step(state, slice(5, 7))
    with pytest.raises(ValueError, match="softmax_attention: this state .* already continued"):
        step(state, slice(5, 7))


def test_asking_which_form_runs_leaves_the_state_alone() -> None:
    q, k, v = tensors()
    _, state = softmax_attention(q, k, v, return_state=True)
    explained = regard.explain(softmax_attention, q, k, v, state=state)
    assert explained.form == "torch_sdpa"
    softmax_attention(q, k, v, state=state)


def test_gradients_flow_through_the_state() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    whole = softmax_attention(q, k, v, causal=True)
    want = torch.autograd.grad(whole.square().sum(), (q, k, v))
    first, state = softmax_attention(
        q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True, return_state=True
    )
    last = softmax_attention(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], causal=True, state=state)
    got = torch.autograd.grad(torch.cat([first, last], 2).square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < budget(torch.float64, "gradient")


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_separate(impl: str, causal: bool) -> None:
    q, k, v = tensors(B=1, T=9, S=12, Dv=4)
    ends_q, ends_k = torch.tensor([0, 4, 4, 6, 9]), torch.tensor([0, 6, 8, 8, 12])
    options: dict[str, Any] = {"causal": causal, "impl": impl}
    keys: dict[str, Any] = {"key_mask": torch.rand(1, 12) < 0.8}
    if impl != "native":
        options |= {"return_aux": True, "sinks": torch.randn(4).double()}
        keys |= {"key_bias": torch.randn(1, 1, 12), "log_decay": -torch.rand(1, 2, 12)}
    result = softmax_attention(
        q, k, v, **options, **keys, cu_seqlens=ends_q.int(), cu_seqlens_k=ends_k.int()
    )
    packed = result if impl == "native" else torch.cat([result[0], result[1].lse[..., None]], 3)
    for n in range(4):
        t, s = (slice(int(e[n]), int(e[n + 1])) for e in (ends_q, ends_k))
        own = {n: x[:, s] if n == "key_mask" else x[:, :, s] for n, x in keys.items()}
        one = softmax_attention(q[:, :, t], k[:, :, s], v[:, :, s], **options, **own)
        one = one if impl == "native" else torch.cat([one[0], one[1].lse[..., None]], 3)
        assert torch.equal(packed[:, :, t], one)


def test_no_sequences_at_all_are_a_packed_call_too() -> None:
    q, k, v = tensors(B=1, T=0, S=0)
    out, aux = softmax_attention(
        q, k, v, cu_seqlens=torch.zeros(1, dtype=torch.int32), return_aux=True
    )
    assert out.shape == (1, 4, 0, 3)
    assert aux.lse.shape == (1, 4, 0)


# --- the ways it is run ---------------------------------------------------------------------


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"S": 0}, {"T": 0, "S": 0}])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_calls(impl: str, sizes: dict[str, int], masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(**sizes))
    mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if masked else None
    for causal in (False, True):
        out = softmax_attention(q, k, v, causal=causal, key_mask=mask, impl=impl)
        assert out.shape == (*q.shape[:3], 3)
        assert (out == 0).all()
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("block_size", [1, 2, 5, 64])
def test_block_size_changes_only_rounding(block_size: int) -> None:
    q, k, v = tensors(T=9, S=11)
    options = operands(7, q, k)
    expected = softmax_attention(q, k, v, **options)
    out = softmax_attention(q, k, v, **options, block_size=block_size)
    assert relative_error(out, expected) < 1e-14


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return result


@pytest.mark.parametrize("impl", ["native", "eager"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_no_matrix_of_all_scores(impl: str, masked: bool, causal: bool) -> None:
    n = 2048
    q, k, v = tensors(B=1, H=2, Hk=1, T=n, S=n, dtype=torch.float32)
    mask = torch.rand(1, n) < 0.9 if masked else None
    with Largest() as largest:
        softmax_attention(q, k, v, causal=causal, key_mask=mask, impl=impl)
    assert 0 < largest.entries <= 4 * n * n / 4


@pytest.mark.parametrize("name", ["native", "eager"])
def test_compiles_whole_and_exports(name: str) -> None:
    q, k, v = tensors(T=5, S=9, dtype=torch.float32)
    options: dict[str, Any] = {"causal": True, "impl": name, "key_mask": torch.rand(2, 9) < 0.7}
    if name == "eager":
        options = operands(4, q, k) | options
    expected = softmax_attention(q, k, v, **options)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return softmax_attention(q, k, v, **options)

    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = compiled(*leaves)
    assert relative_error(out, expected) < 1e-6
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
    torch._dynamo.reset()
    exported = torch.export.export(Module(), (q, k, v)).module()
    assert relative_error(exported(q, k, v), expected) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_operators_are_registered_soundly(masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(Dv=4, dtype=torch.float32))
    mask = torch.rand(2, 1, 7, 7) < 0.7 if masked else None
    options = (mask, not masked, 0.3)
    torch.library.opcheck(torch.ops.regard.softmax_fused_fwd.default, (q, k, v, *options))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = torch.ops.regard.softmax_fused_fwd(q, k, v, *options)
    saved = (torch.randn_like(out), q, k, v, mask, out, lse, *options[1:])
    torch.library.opcheck(torch.ops.regard.softmax_fused_bwd.default, saved)


def test_auto_compiles_with_a_state() -> None:
    q, k, v = tensors(dtype=torch.float32)
    _, state = softmax_attention(q, k, v, causal=True, return_state=True)
    expected = softmax_attention(q, k, v, causal=True, state=state.fork())

    def step(q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> Tensor:
        _, state = softmax_attention(old_k[:, [0, 0, 1, 1]], old_k, old_v, return_state=True)
        return softmax_attention(q, k, v, causal=True, state=state)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(q, k, v, state.k, state.v), expected) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", FORMS)
def test_meta_tensors_inference_mode_and_strides(impl: str) -> None:
    q, k, v = tensors(T=6, S=6, Dv=4)
    meta = softmax_attention(*(x.to("meta") for x in (q, k, v)), causal=True, impl=impl)
    assert meta.shape == (2, 4, 6, 4)
    assert meta.device.type == "meta"
    expected = softmax_attention(q, k, v, causal=True, impl=impl)
    with torch.inference_mode():
        out, state = softmax_attention(q, k, v, causal=True, return_state=True, impl=impl)
        assert torch.equal(out, expected)
        softmax_attention(q, k, v, causal=True, state=state, impl=impl)
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    copies = [x.clone() for x in strided]
    assert relative_error(softmax_attention(*strided, causal=True, impl=impl), expected) < 1e-14
    assert all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True))


@pytest.mark.parametrize("impl", ["auto", "native", "eager"])
def test_autocast_casts_and_then_steps_aside(impl: str) -> None:
    q, k, v = tensors(dtype=torch.float32)
    expected = softmax_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = softmax_attention(q, k.bfloat16(), v, impl=impl)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_float16_on_a_cpu_is_computed_in_float32() -> None:
    q, k, v = tensors(dtype=torch.float16)
    assert "native" not in serving(q, k, v)
    out = softmax_attention(q * 200, k * 200, v)  # the products overflow float16
    expected = softmax_reference((q * 200).double(), (k * 200).double(), v.double())
    assert out.dtype == torch.float16
    assert relative_error(out, expected) < budget(torch.float16)


def test_a_tensor_scale_has_its_gradient_in_the_fused_kernel_too() -> None:
    q, k, v = tensors()
    scale = torch.rand(4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: softmax_attention(q, k, v, causal=True, scale=s, impl="native"), scale
    )


# --- which form, and what is refused --------------------------------------------------------


def test_auto_takes_the_fused_kernel_only_where_it_is_exact() -> None:
    q, k, v = tensors()
    assert regard.explain(softmax_attention, q, k, v, causal=True).form == "torch_sdpa"
    every = operands(1, q, k)
    for name in ("key_bias", "bias", "log_decay", "softcap", "sinks"):
        explained = regard.explain(softmax_attention, q, k, v, **{name: every[name]})
        assert explained.form == "blockwise", name
        assert explained.reasons["torch_sdpa"]
    assert regard.explain(softmax_attention, q, k, v, return_aux=True).form == "blockwise"
    assert regard.explain(softmax_attention, q, k, v, block_size=2).form == "blockwise"


def test_return_order() -> None:
    q, k, v = tensors()
    out = softmax_attention(q, k, v, impl="eager")
    both, state, aux = softmax_attention(q, k, v, return_state=True, return_aux=True, impl="eager")
    assert torch.equal(out, both)
    assert isinstance(state, KVCache)
    assert isinstance(aux, SoftmaxAux)
    assert softmax_attention(q, k, v, return_aux=True)[1].lse.dtype == torch.float64
    assert card.op is softmax_attention
    assert card.reference is softmax_reference


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": "q"}, TypeError, "q must be a torch.Tensor"),
    ({"k": torch.zeros(2, 2, 7, 5).double()}, ValueError, "k must be of q's head size 4"),
    ({"v": torch.zeros(2, 2, 6, 3).double()}, ValueError, r"v must be \[B, 2, 7, Dv\]"),
    ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ({"scale": "a"}, TypeError, "scale must be a number"),
    ({"scale": INF}, ValueError, "scale must be a finite number"),
    ({"scale": torch.ones(3)}, ValueError, r"scale must be of shape \[4\]"),
    ({"key_mask": torch.ones(2, 7)}, TypeError, "key_mask must be a bool tensor"),
    ({"key_mask": torch.ones(2, 8).bool()}, ValueError, r"key_mask must be of shape \[2, 7\]"),
    ({"key_bias": torch.ones(2, 3, 7)}, ValueError, r"key_bias must be .*\[2, 1 or 2 or 4, 7\]"),
    ({"log_decay": torch.ones(2, 7)}, ValueError, "log_decay must be of shape"),
    ({"log_decay": torch.ones(2, 1, 7).int()}, TypeError, "log_decay must be a floating-point"),
    ({"bias": torch.ones(7, 6)}, ValueError, r"bias must be of shape \[1 or 7, 1 or 7\]"),
    ({"bias": torch.ones(1, 1, 1, 7, 7)}, ValueError, "bias must be broadcastable to"),
    ({"bias": torch.ones(7, 7).bool()}, TypeError, "bias must be a floating-point tensor"),
    ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor"),
    ({"softcap": 0.0}, ValueError, "softcap must be a finite number above 0"),
    ({"sinks": torch.ones(2)}, ValueError, r"sinks must be of shape \[4\]"),
    ({"window": 3}, TypeError, r"window must be a pair \(left, right\)"),
    ({"window": (-2, 0)}, ValueError, r"window must be a pair \(left, right\)"),
    ({"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens must be an int32 tensor"),
    ({"cu_seqlens_k": torch.zeros(2).int()}, ValueError, "cu_seqlens_k must be given together"),
    ({"cu_seqlens": torch.tensor([0, 7]).int()}, ValueError, "q must be of batch size 1"),
    ({"block_size": 0}, ValueError, "block_size must be an int of at least 1"),
    ({"state": 3}, TypeError, "state must be None or the KVCache"),
    ({"return_state": None}, TypeError, "return_state must be True or False"),
    ({"return_aux": "yes"}, TypeError, "return_aux must be True or False"),
    ({"impl": "eagre"}, ValueError, "impl must be one of .* did you mean 'eager'"),
    ({"impl": "triton"}, ValueError, "impl='triton' cannot serve this call"),
    ({"impl": "native", "softcap": 1.0}, ValueError, "torch's kernel has no softcap"),
    ({"impl": "reference", "block_size": 1}, ValueError, "no blocks to size"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD)
def test_a_bad_argument_is_named(wrong: dict[str, Any], kind: type, message: str) -> None:
    arguments: dict[str, Any] = dict(zip("qkv", tensors(), strict=True)) | wrong
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(kind, match=f"^softmax_attention: .*{message}"):
        softmax_attention(q, k, v, **arguments)


def test_options_that_exclude_packing() -> None:
    q, k, v = tensors(B=1)
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    _, state = softmax_attention(q, k, v, return_state=True)
    for options in ({"return_state": True}, {"bias": torch.zeros(7, 7)}, {"state": state}):
        with pytest.raises(ValueError, match=f"softmax_attention: {next(iter(options))} must be"):
            softmax_attention(q, k, v, cu_seqlens=ends, **options)
    with pytest.raises(ValueError, match="cu_seqlens must be non-decreasing from 0"):
        softmax_attention(q, k, v, cu_seqlens=ends - 1)
    with pytest.raises(ValueError, match="cu_seqlens_k must be given when T != S"):
        softmax_attention(q[:, :, :3], k, v, cu_seqlens=ends)


def test_a_state_of_another_shape_is_refused() -> None:
    q, k, v = tensors()
    _, state = softmax_attention(q, k, v, return_state=True)
    with pytest.raises(ValueError, match="softmax_attention: k must be the state's"):
        softmax_attention(q[:1], k[:1], v[:1], state=state)
