"""Short calls of softmax attention: the op's results, and those of eager models bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_models as tiny
from adapt.transformers.models_and_inputs import DECODERS, case, output
from adapt.transformers.test_swap import stepwise
from regard import mechanisms
from regard.adapt import transformers as adapt
from regard.adapt.transformers import short
from regard.ops import softmax_attention


@pytest.mark.parametrize("sizes", [(5, 5), (1, 9), (3, 9), (9, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window": (2, 0)},
        {"window": (1, 2)},
        {"key_mask": True},
        {"causal": True, "key_mask": True, "softcap": 2.0},
        {"causal": True, "sinks": True},
        {"bias": True},
        {"bias": True, "key_mask": True, "sinks": True},
    ],
)
def test_the_ops_results(sizes: tuple[int, int], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    T, S = sizes
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 6)
    given = {"scale": 0.4, **options}
    if "key_mask" in given:
        given["key_mask"] = torch.ones(2, S, dtype=torch.bool)
        given["key_mask"][0, 2:], given["key_mask"][1] = False, S != 4
        k[0, :, 2:], v[0, :, 2:] = torch.nan, torch.inf
    if "sinks" in given:
        given["sinks"] = torch.randn(4)
    if "bias" in given:
        given["bias"] = torch.randn(2, 1, T, S)
        given["bias"][0, :, 0] = -torch.inf
    assert short.serves(mechanisms["softmax"], given, q, k)
    found = short.attend(q, k, v, **given)
    torch.testing.assert_close(found, softmax_attention(q, k, v, **given), rtol=0, atol=2e-6)


def test_what_is_short() -> None:
    card, given = mechanisms["softmax"], {"scale": 1.0, "causal": True}
    q, k = torch.zeros(1, 8, 32, 8), torch.zeros(1, 8, 32, 8)
    assert short.serves(card, given, q, k)
    assert not short.serves(card, given, q, torch.zeros(1, 8, 33, 8))
    assert not short.serves(card, given, q.double(), k.double())
    assert not short.serves(card, given, q.bfloat16(), k.bfloat16())
    assert not short.serves(card, given | {"impl": "eager"}, q, k)
    assert not short.serves(card, given | {"scale": torch.ones(8)}, q, k)
    assert not short.serves(mechanisms["local_linear"], given, q, k)
    assert not short.serves(card, given, q, k[:, :, :0])


@pytest.mark.parametrize("kind", [*DECODERS, "llava", "whisper", "bert", "ViT"])
def test_bits_of_the_eager_model(kind: str) -> None:
    model, inputs = case(kind, "none")
    run = stepwise if kind in (*DECODERS, "llava", "whisper") else output
    before = run(model, inputs)
    adapt.swap(model, "softmax")
    assert torch.equal(run(model, inputs), before)


def test_a_call_of_many_scores_goes_to_the_op() -> None:
    """And agrees with the one that computes a few queries at a time."""
    model = tiny.decoder("Llama", max_position_embeddings=128)
    ids = torch.randint(2, 70, (1, 60), generator=torch.Generator().manual_seed(0))
    adapt.swap(model, "softmax")
    with torch.no_grad():
        whole = model(ids).logits
        start = model(ids[:, :20], use_cache=True)
        name = next(n for n in ("cache", "past_key_values") if n in start)
        rest = model(ids[:, 20:], **{name: start[name]}, use_cache=True).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), whole, rtol=0, atol=1e-5)
