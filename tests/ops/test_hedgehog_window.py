"""What is particular to Hedgehog with a softmax window: its two layouts, and the authors' code."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import regard
from ops.hedgehog_samples import (
    close,
    close_gradient,
    golden,
    gradients,
    heads_of,
    inputs,
    losses_of,
    maps_of,
)
from ops.samples import megabytes_over_inputs
from regard.core.card import Case, Operand
from regard.ops import (
    hedgehog_attention,
    hedgehog_window_attention,
    hedgehog_window_weights,
    softmax_attention,
)
from regard.ops.hedgehog_window.reference import hedgehog_window_reference
from regard.testing import check

LAYOUTS = ["sliding", "terraced"]


def their_options(tensors: dict[str, Tensor], config: dict, layout: str) -> dict:
    factors = tensors["state.window_factors"].clone().requires_grad_()
    return {
        **maps_of(tensors), "window_length": config["window_size"], "layout": layout,
        "gamma": factors.sigmoid().flatten(), "factors": factors,
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_hybrid_of_the_authors(layout):
    tensors, config = golden(f"hybrid_{layout}")
    q, k, v = heads_of(tensors, config)
    given = their_options(tensors, config, layout)
    factors = given.pop("factors")
    out = hedgehog_window_attention(q, k, v, **given)
    weights = hedgehog_window_weights(q, k, **given)
    close(out, tensors["out.head_out_student"], 5e-5)
    close(weights, tensors["out.attn_student"], 1e-5)
    joined = out.transpose(1, 2).flatten(2) @ tensors["state.o_proj.weight"].mT
    close(joined, tensors["out.student_output"], 5e-5)
    found = losses_of(out, weights, tensors)
    for name, loss in zip(("xent", "mse", "total"), found, strict=True):
        torch.testing.assert_close(loss, tensors[f"out.loss_{name}"], rtol=1e-5, atol=0.0)
    found[2].backward()
    close_gradient(factors.grad, tensors["grad.window_factors"])
    for side in "qk":
        expected = tensors[f"grad.feature_map_{side}.mlp.layer"]
        close_gradient(given[f"map_{side}"].grad, expected)


def test_decodes_as_the_authors():
    tensors, config = golden("hybrid_sliding")
    heads = heads_of(tensors, config)
    given = their_options(tensors, config, "sliding")
    given.pop("factors")
    with torch.no_grad():
        pieces = [x.split([9] + [1] * 13, 2) for x in heads]
        state, rows = None, []
        for q, k, v in zip(*pieces, strict=True):
            out, state = hedgehog_window_attention(q, k, v, state=state, return_state=True, **given)
            rows.append(out)
        decoded = torch.cat(rows[1:], 2).transpose(1, 2).flatten(2)
    close(decoded @ tensors["state.o_proj.weight"].mT, tensors["out.decode_output"], 5e-5)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("w", [5, 64])
def test_chunks_are_the_weights_times_the_values(T, layout, w):
    (q, k, v), maps = inputs(T)
    gamma = torch.tensor([0.1, 0.4, 0.9, 0.5], dtype=torch.float64, requires_grad=True)
    given = {
        **maps, "window_length": w, "layout": layout, "gamma": gamma, "affine": True, "scale": 0.7
    }  # fmt: skip
    weights = hedgehog_window_weights(q, k, **given)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, T).double(), rtol=0, atol=1e-12)
    expected = weights @ v.repeat_interleave(2, 1)
    leaves = (q, k, v, gamma, *maps.values())
    wanted = gradients(expected, *leaves)
    for chunk in (None, 7) if T < 100 else (None,):
        out = hedgehog_window_attention(q, k, v, chunk_size=chunk, **given)
        close(out, expected, 1e-10)
        for one, other in zip(gradients(out, *leaves), wanted, strict=True):
            close_gradient(one, other, 1e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gamma", [1e-3, 0.5, 1.0])
def test_a_window_over_all_is_softmax_attention(layout, gamma):
    (q, k, v), maps = inputs(20)
    w = 20 if layout == "sliding" else 10
    out = hedgehog_window_attention(q, k, v, window_length=w, layout=layout, gamma=gamma, **maps)
    close(out, softmax_attention(q, k, v, causal=True), 1e-12)


def test_without_weight_the_window_leaves_linear_attention_to_old_tokens():
    (q, k, v), maps = inputs(40)
    w, gamma = 8, torch.tensor(-40.0, dtype=torch.float64).sigmoid()
    out = hedgehog_window_attention(q, k, v, window_length=w, gamma=gamma, **maps)
    old = hedgehog_attention(q[:, :, w:], k[:, :, :-w], v[:, :, :-w], causal=True, **maps)
    close(out[:, :, w:], old, 1e-9)  # what is left of the window
    assert (out[:, :, 0] - v.repeat_interleave(2, 1)[:, :, 0]).abs().max() < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("w", [4, 7])
def test_decoding_is_the_parallel_call_for_every_prompt(layout, w):
    (q, k, v), maps = inputs(4 * w + 3, key_maps=4)
    given = {**maps, "window_length": w, "layout": layout}
    whole = hedgehog_window_attention(q, k, v, **given)
    for prompt in (1, w - 1, w, w + 1, 3 * w):
        rest = [1] * (q.shape[2] - prompt)
        for cuts in ([prompt, *rest], [prompt, len(rest)]):
            state, rows = None, []
            pieces = (x.split(cuts, 2) for x in (q, k, v))
            for x, y, z in zip(*pieces, strict=True):
                out, state = hedgehog_window_attention(
                    x, y, z, state=state, return_state=True, **given
                )
                rows.append(out)
            close(torch.cat(rows, 2), whole, 1e-11)
            kept = w if layout == "sliding" else 2 * w
            shapes = {name: tuple(t.shape) for name, t in state.tensors.items()}
            assert shapes["k"] == (2, 2, kept, 6)
            assert shapes["S"] == (2, 4, 14, 5)


def test_alignment_at_the_end_is_that_of_the_authors():
    """With r = T mod w the first block has r tokens: token i is in block (i + w - r) // w."""
    T, w = 21, 8
    (q, k, v), maps = inputs(T)
    given = {**maps, "window_length": w, "layout": "terraced"}
    block = (torch.arange(T) + 3) // w
    near = (block[:, None] - block[None, :] <= 1).tril()
    weights = hedgehog_window_weights(q, k, align="end", **given)
    exact = hedgehog_window_weights(q, k, align="end", **{**given, "gamma": 0.0})
    assert torch.equal(exact == 0, ~(~near).tril().expand_as(exact))  # only what lies behind
    out = hedgehog_window_attention(q, k, v, align="end", **given)
    close(out, weights @ v.repeat_interleave(2, 1), 1e-11)
    assert (out - hedgehog_window_attention(q, k, v, **given)).abs().max() > 1e-3
    even, start = (
        hedgehog_window_attention(q[:, :, :16], k[:, :, :16], v[:, :, :16], align=align, **given)
        for align in ("end", "start")
    )
    assert torch.equal(even, start)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_counted_from_the_first_real_key(layout):
    (q, k, v), maps = inputs(19)
    given = {**maps, "window_length": 4, "layout": layout}
    alone = hedgehog_window_attention(q, k, v, **given)
    for pad in (1, 3, 4, 6):
        longer = [torch.cat([torch.full_like(x[:, :, :pad], 9.0), x], 2) for x in (q, k, v)]
        mask = (torch.arange(19 + pad) >= pad)[None].expand(2, -1)
        out = hedgehog_window_attention(*longer, key_mask=mask, **given)
        close(out[:, :, pad:], alone, 1e-12)
        weights = hedgehog_window_weights(longer[0], longer[1], key_mask=mask, **given)
        close(weights @ longer[2].repeat_interleave(2, 1), out, 1e-12)


def test_bfloat16_over_16k_tokens():
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 16384, 16, generator=make).bfloat16() for _ in range(3))
    out = hedgehog_window_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    exact = hedgehog_window_attention(q.double(), k.double(), v.double())
    assert float((out.double() - exact).norm() / exact.norm()) < 1.2e-2


def _learned(
    q, k, v, *, map_q, map_k, causal=True, key_mask=None, scale=None, cu_seqlens=None,
    cu_seqlens_k=None, chunk_size=None, state=None, return_state=False, impl="auto",
):  # fmt: skip
    for name, x in (("map_q", map_q), ("map_k", map_k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"hedgehog_window_attention: {name} must be a tensor here")
    return hedgehog_window_attention(
        q, k, v, map_q=map_q, map_k=map_k, causal=causal, key_mask=key_mask, scale=scale,
        cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, chunk_size=chunk_size, state=state,
        return_state=return_state, impl=impl, window_length=4,
    )  # fmt: skip


_learned.__name__ = _learned.__qualname__ = "hedgehog_window_attention"
# Under autocast a map stays in float32, which a cast operand of the law does not.
LAWS = [name for name in regard.testing.LAWS if name != "autocast"]
LEARNED = replace(
    regard.mechanisms["hedgehog_window"], op=_learned, cases=(Case(),),
    reference=partial(hedgehog_window_reference, window_length=4),
    operands=(
        Operand("map_q", "h d dv", "head"),
        Operand("map_k", "h d dv", "head"),
    ),
)  # fmt: skip


@pytest.mark.slow
def test_the_whole_contract_with_maps_of_its_own():
    check(LEARNED, laws=LAWS, seed=6).raise_if_failed()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"causal": False}, "causal must be True: a window of recent keys needs an order"),
        ({"window_length": 0}, "window_length must be an int of at least 1"),
        ({"layout": "block"}, "layout must be one of 'sliding', 'terraced'"),
        ({"align": "end"}, "align must be 'start' with layout='sliding'"),
        ({"gamma": 1.5}, "gamma must be in [0, 1], got 1.5"),
        ({"gamma": torch.ones(3)}, "gamma must be of shape [] or [4]"),
        ({"affine": 1}, "affine must be True or False"),
        ({"activation": "exp"}, "activation must be one of bounded features"),
        (
            {"align": "end", "layout": "terraced", "return_state": True},
            "return_state must be left out with align='end'",
        ),
        (
            {"align": "end", "layout": "terraced", "key_mask": torch.ones(2, 30).bool()},
            "key_mask must be left out with align='end'",
        ),
    ],
)
def test_a_wrong_window_is_named(wrong, message):
    (q, k, v), _ = inputs(dtype=torch.float32)
    with pytest.raises((TypeError, ValueError)) as caught:
        hedgehog_window_attention(q, k, v, **wrong)
    assert str(caught.value).startswith("hedgehog_window_attention: ")
    assert message in str(caught.value)


def test_states_do_not_mix():
    (q, k, v), _ = inputs(dtype=torch.float32)
    _, state = hedgehog_window_attention(q, k, v, window_length=4, return_state=True)
    with pytest.raises(ValueError, match=r"state\['k'\] must be float32 \[2, 2, 5, 6\]"):
        hedgehog_window_attention(q, k, v, window_length=5, state=state)
    with pytest.raises(ValueError, match="state must be a state of hedgehog_attention"):
        hedgehog_attention(q, k, v, causal=True, state=state)


@pytest.mark.slow
def test_memory_and_time_are_linear():
    """One head of 32 channels at 16384 tokens: a T x S matrix would be 1024 MB."""
    grown = megabytes_over_inputs(
        "regard.ops:hedgehog_window_attention", 16384, D=32, backward=True
    )
    assert grown < 150


def test_gradients_of_both_layouts_by_finite_differences():
    (q, k, v), maps = inputs(6, D=2, Dv=1, F=2, H=2, Hk=1)
    gamma = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    for layout in LAYOUTS:

        def call(q, k, v, map_q, map_k, gamma, layout=layout):
            return hedgehog_window_attention(
                q, k, v, map_q=map_q, map_k=map_k, gamma=gamma, window_length=2, layout=layout,
                affine=True,
            )  # fmt: skip

        assert torch.autograd.gradcheck(call, (q, k, v, *maps.values(), gamma))


def test_gradients_agree_in_any_split():
    (q, k, v), maps = inputs(23)
    leaves = (q, k, v, *maps.values())
    given = {**maps, "window_length": 3, "layout": "terraced"}
    wanted = gradients(hedgehog_window_attention(q, k, v, **given), *leaves)
    state, rows = None, []
    for x, y, z in zip(*(t.split([5, 1, 17], 2) for t in (q, k, v)), strict=True):
        out, state = hedgehog_window_attention(x, y, z, state=state, return_state=True, **given)
        rows.append(out)
    for one, other in zip(gradients(torch.cat(rows, 2), *leaves), wanted, strict=True):
        close_gradient(one, other, 1e-8)
