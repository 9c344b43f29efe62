"""What is particular to Hedgehog: its feature maps, and the authors' code."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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
from regard.explain import explain
from regard.ops import hedgehog_attention, hedgehog_weights
from regard.ops.hedgehog.reference import hedgehog_attention_reference
from regard.ops.linear.learned_features import ACTIVATIONS, TWO_SIDED
from regard.testing import check

LENGTHS = [1, 2, 63, 64, 65, 200]


def test_is_the_linear_attention_of_the_authors():
    tensors, config = golden("linear_softmaxdim")
    q, k, v = heads_of(tensors, config)
    maps = maps_of(tensors)
    out = hedgehog_attention(q, k, v, causal=True, **maps)
    weights = hedgehog_weights(q, k, causal=True, **maps)
    close(out, tensors["out.head_out_student"], 5e-5)
    close(weights, tensors["out.attn_student"], 1e-5)
    joined = out.transpose(1, 2).flatten(2) @ tensors["state.o_proj.weight"].mT
    close(joined, tensors["out.student_output"], 5e-5)
    found = losses_of(out, weights, tensors)
    for name, loss in zip(("xent", "mse", "total"), found, strict=True):
        torch.testing.assert_close(loss, tensors[f"out.loss_{name}"], rtol=1e-5, atol=0.0)
    found[2].backward()
    for side in "qk":
        close_gradient(maps[f"map_{side}"].grad, tensors[f"grad.feature_map_{side}.mlp.layer"])


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_the_output_is_the_weights_times_the_values(T, causal):
    (q, k, v), maps = inputs(T)
    weights = hedgehog_weights(q, k, causal=causal, **maps)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, T).double(), rtol=0, atol=1e-9)
    expected = weights @ v.repeat_interleave(2, 1)
    out = hedgehog_attention(q, k, v, causal=causal, **maps)
    close(out, expected, 1e-10)
    leaves = (q, k, v, *maps.values())
    wanted = gradients(expected, *leaves)
    for one, other in zip(gradients(out, *leaves), wanted, strict=True):
        close_gradient(one, other, 1e-8)


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        *((name, {}) for name in ACTIVATIONS),
        *((name, {"skip": True}) for name in ACTIVATIONS),
        *((name, {"full_space": False}) for name in TWO_SIDED),
    ],
)
def test_every_activation_in_every_form(activation, options):
    (q, k, v), maps = inputs(37, F=6, key_maps=4)
    make = torch.Generator().manual_seed(3)
    biases = {
        "bias_q": torch.randn(4, generator=make, dtype=torch.float64).requires_grad_(),
        "bias_k": torch.randn(4, 6, generator=make, dtype=torch.float64).requires_grad_(),
    }
    given = {"activation": activation, "causal": True, **maps, **biases, **options}
    expected = hedgehog_attention_reference(q, k, v, **given)
    leaves = (q, k, v, *maps.values(), *biases.values())
    wanted = gradients(expected, *leaves)
    close(hedgehog_attention(q, k, v, **given), expected, 1e-10)
    found = gradients(hedgehog_attention(q, k, v, **given), *leaves)
    for one, other in zip(found, wanted, strict=True):
        close_gradient(one, other, 1e-8)
    weights = hedgehog_weights(q, k, **given)
    close(weights @ v.repeat_interleave(2, 1), expected, 1e-10)
    expected, single = expected.detach(), [x.detach().float() for x in (q, k, v)]
    given = {n: x.detach() if isinstance(x, Tensor) else x for n, x in given.items()}
    for impl in explain(hedgehog_attention, *single, **given).available:
        out = hedgehog_attention(*single, impl=impl, **given)
        assert float((out - expected).norm() / expected.norm()) < 1e-5, impl


def test_recurrent_and_chunked_and_whole_agree_over_any_split():
    (q, k, v), maps = inputs(200, key_maps=4)
    whole = hedgehog_attention(q, k, v, causal=True, **maps)
    for cuts in ([200], [64, 136], [1] * 5 + [195], [63, 1, 1, 135]):
        state, rows = None, []
        for x, y, z in zip(q.split(cuts, 2), k.split(cuts, 2), v.split(cuts, 2), strict=True):
            out, state = hedgehog_attention(
                x, y, z, causal=True, state=state, return_state=True, **maps
            )
            rows.append(out)
        close(torch.cat(rows, 2), whole, 1e-11)
        assert {name: tuple(t.shape) for name, t in state.tensors.items()} == {
            "S": (2, 4, 14, 5), "z": (2, 4, 14),
        }  # fmt: skip


def test_a_map_per_key_head_is_a_map_per_query_head_repeated():
    (q, k, v), maps = inputs(33)
    one, small = hedgehog_attention(q, k, v, causal=True, return_state=True, **maps)
    repeated = {**maps, "map_k": maps["map_k"].repeat_interleave(2, 0)}
    other, large = hedgehog_attention(q, k, v, causal=True, return_state=True, **repeated)
    close(one, other, 1e-12)
    assert small["S"].shape[1] == 2
    close(large["S"], small["S"].repeat_interleave(2, 1), 1e-12)
    shared = {"map_q": maps["map_q"][:1], "map_k": maps["map_k"][:1]}
    expanded = {name: x.expand(4, -1, -1) for name, x in shared.items()}
    close(hedgehog_attention(q, k, v, **shared), hedgehog_attention(q, k, v, **expanded), 1e-12)


def test_no_maps_are_identities():
    (q, k, v), _ = inputs()
    eye = torch.eye(6, dtype=torch.float64).expand(4, -1, -1)
    expected = hedgehog_attention(q, k, v, map_q=eye, map_k=eye, causal=True)
    close(hedgehog_attention(q, k, v, causal=True), expected, 1e-12)
    zero = torch.zeros(4, 6, 6, dtype=torch.float64)
    skipped = hedgehog_attention(q, k, v, map_q=zero, map_k=zero, skip=True, causal=True)
    close(skipped, expected, 1e-12)


def test_a_dead_query_gives_next_to_nothing():
    """Features at their clamp of 1e-12: the epsilon outweighs them, as in the authors' code."""
    q, k, v = -torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 2)
    out = hedgehog_attention(q, k, v, activation="relu")
    below = 3 * 4 * 1e-12
    torch.testing.assert_close(out, torch.full((1, 1, 3, 2), below / (below + 1e-12)))
    assert torch.equal(hedgehog_attention(q, k, v, activation="relu", epsilon=0.0), v)


def test_the_exponential_map_is_monotone_along_the_query():
    """2 sum_i cosh((1 + c) q_i) for k = c q: it grows from c = -1 on, where features mirror."""
    q = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    k = torch.linspace(-1, 4, 51)[:, None] * q
    assert (hedgehog_weights(q, k, activation="exp").diff() > 0).all()
    bounded = hedgehog_weights(q, k).diff()  # each weight is 2 at most: it stops growing
    assert (bounded[..., :25] > 0).all()
    assert bounded[..., -1] < bounded[..., 20]


def test_large_queries_and_keys_do_not_overflow():
    q, k, v = (x.detach().float() for x in inputs(50, F=6)[0])
    for activation in ACTIVATIONS:
        leaves = [x.clone().requires_grad_() for x in (200 * q, 200 * k, v)]
        out = hedgehog_attention(*leaves, activation=activation, causal=True)
        assert out.isfinite().all()
        for gradient in gradients(out, *leaves):
            assert gradient.isfinite().all()


def test_bfloat16_over_16k_tokens():
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16384, 16, generator=make).bfloat16() for _ in range(3))
    out, state = hedgehog_attention(q, k, v, causal=True, return_state=True)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert state["S"].dtype == torch.float32
    exact = hedgehog_attention(q.double(), k.double(), v.double(), causal=True)
    assert float((out.double() - exact).norm() / exact.norm()) < 1.2e-2


def test_the_state_has_one_size_and_decoding_one_speed():
    make = torch.Generator().manual_seed(0)
    token = [torch.randn(1, 4, 1, 32, generator=make) for _ in range(3)]
    states = {}
    for length in (100, 20_000):
        q, k, v = (torch.randn(1, 4, length, 32, generator=make) for _ in range(3))
        _, states[length] = hedgehog_attention(q, k, v, causal=True, return_state=True)
    sizes = [{n: t.shape for n, t in state.tensors.items()} for state in states.values()]
    assert sizes[0] == sizes[1]

    def seconds(state):
        best = float("inf")
        for _ in range(15):
            start = time.process_time()
            for _ in range(20):
                hedgehog_attention(*token, causal=True, state=state, return_state=True)
            best = min(best, time.process_time() - start)
        return best

    with torch.inference_mode():
        ratios = [seconds(states[20_000]) / seconds(states[100]) for _ in range(3)]
    assert min(ratios) < 1.2


def _learned(
    q, k, v, *, map_q, map_k, causal=False, key_mask=None, cu_seqlens=None, cu_seqlens_k=None,
    chunk_size=None, state=None, return_state=False, impl="auto",
):  # fmt: skip
    for name, x in (("map_q", map_q), ("map_k", map_k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"hedgehog_attention: {name} must be a tensor here")
    return hedgehog_attention(
        q, k, v, map_q=map_q, map_k=map_k, causal=causal, key_mask=key_mask,
        cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, chunk_size=chunk_size, state=state,
        return_state=return_state, impl=impl,
    )  # fmt: skip


_learned.__name__ = _learned.__qualname__ = "hedgehog_attention"
# Under autocast a map stays in float32, which a cast operand of the law does not.
LAWS = [name for name in regard.testing.LAWS if name != "autocast"]
CARD = regard.mechanisms["hedgehog"]
LEARNED = replace(
    CARD, op=_learned, cases=(Case(),),
    operands=(
        Operand("map_q", "h d dv", "head"),
        Operand("map_k", "hk d dv", "head"),
    ),
)  # fmt: skip


def test_the_contract_with_maps_of_its_own():
    laws = ["equals_reference", "gradcheck", "decode", "masked_junk", "no_leak", "packed"]
    check(LEARNED, laws=laws, seed=5).raise_if_failed()


@pytest.mark.slow
def test_the_whole_contract_with_maps_of_its_own():
    check(LEARNED, laws=LAWS, seed=6).raise_if_failed()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"map_q": torch.ones(3, 6, 7)}, "map_q must be of shape [1 or 4, 6, 7]"),
        ({"map_k": torch.ones(3, 6, 7)}, "map_k must be of shape [1 or 2 or 4, 6, 7]"),
        ({"map_q": torch.ones(4, 6, 7)}, "map_q must be onto 6 channels, as the other side's"),
        ({"map_k": torch.ones(4, 6, 7)}, "map_k must be onto 6 channels, as the other side's"),
        ({"map_q": 3}, "map_q must be a torch.Tensor"),
        ({"bias_q": torch.ones(5)}, "bias_q must be of shape [1 or 4]"),
        ({"bias_k": torch.ones(4, 3)}, "bias_k must be of shape [1 or 2 or 4, 6]"),
        ({"activation": "softmax"}, "activation must be one of 'softmax_dim'"),
        ({"activation": "relu", "full_space": False}, "full_space must be True with"),
        ({"skip": True}, "skip must be False without maps to skip"),
        ({"epsilon": -1.0}, "epsilon must be a finite number of at least 0.0"),
    ],
)
def test_a_wrong_map_is_named(wrong, message):
    (q, k, v), _ = inputs(dtype=torch.float32)
    with pytest.raises((TypeError, ValueError)) as caught:
        hedgehog_attention(q, k, v, **wrong)
    assert str(caught.value).startswith("hedgehog_attention: ")
    assert message in str(caught.value)


@pytest.mark.slow
def test_memory_is_linear_with_gradients():
    """One head of 64 channels at 65536 tokens: 16 MB each of q, k, v, 32 MB of features each."""
    grown = megabytes_over_inputs(
        "regard.ops:hedgehog_attention", 65536, backward=True, options="causal=True", again=True
    )
    assert grown < 12 * 16


@pytest.mark.slow
def test_is_faster_than_softmax_and_linear_in_time():
    """In CPU time, the least of several runs, the feature maps included."""

    def milliseconds(function, runs):
        best = float("inf")
        for _ in range(runs):
            start = time.process_time()
            function()
            best = min(best, time.process_time() - start)
        return 1e3 * best

    make = torch.Generator().manual_seed(0)
    maps = {f"map_{side}": torch.randn(4, 64, 64, generator=make) / 8 for side in "qk"}
    times = {}
    with torch.inference_mode():
        for T, least in ((1024, 1.3), (4096, 4.0), (16384, 12.0)):
            q, k, v = (torch.randn(1, 4, T, 64, generator=make) for _ in range(3))
            of_softmax = partial(scaled_dot_product_attention, q, k, v, is_causal=True)
            softmax = milliseconds(of_softmax, 3)
            times[T] = milliseconds(partial(hedgehog_attention, q, k, v, causal=True, **maps), 5)
            assert softmax / times[T] >= least, f"T={T}: {softmax:.1f} ms over {times[T]:.1f} ms"
    assert times[16384] / times[4096] < 5.0
