"""States of fixed size in the caches of transformers: steps, crops, beams, assisted decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_models as tiny
from adapt.transformers.models_and_inputs import IDS, case, padded
from regard.adapt import transformers as adapt
from regard.adapt.transformers import StateLayer

FIXED = {
    "linear": {},
    "hedgehog": {},
    "hedgehog_window": {"window_length": 3},
    "delta": {},
    "gated_delta": {},
    "mesa": {},
    "rat": {"chunk_length": 3},
    "lightning": {},
    "inline": {},
    "relu_linear": {"minimum": 0.0},
}


def swapped(mechanism: str, **more: Any) -> Any:
    model = tiny.decoder("Llama")
    torch.manual_seed(5)
    adapt.swap(model, mechanism, **FIXED[mechanism], **more)
    return model


def cache_of(found: Any) -> tuple[str, Any]:
    name = next(n for n in ("cache", "past_key_values") if n in found)
    return name, found[name]


@pytest.mark.parametrize("mechanism", FIXED)
def test_every_step_equals_a_whole_call(mechanism: str) -> None:
    model, inputs = swapped(mechanism), padded("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        found = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        name, cache = cache_of(found)
        assert all(isinstance(layer, StateLayer) for layer in cache.layers)
        logits = [found.logits]
        for start, stop in ((4, 5), (5, 7), (7, 8), (8, 9)):
            found = model(ids[:, start:stop], attention_mask=mask[:, :stop], **{name: cache})
            logits.append(found.logits)
    steps = torch.cat(logits, 1)[mask.bool()]
    torch.testing.assert_close(steps, whole[mask.bool()], atol=5e-5, rtol=1e-4)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("mechanism", FIXED)
def test_beams_equal_the_uncached_result(mechanism: str) -> None:
    model, inputs = swapped(mechanism), padded("left")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    whole = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options), whole)


@pytest.mark.parametrize("mechanism", ["linear", "gated_delta", "rat", "hedgehog_window"])
def test_crop_replays(mechanism: str) -> None:
    model, inputs = swapped(mechanism, past=3), padded("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        found = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
        name, cache = cache_of(found)
        other = torch.full_like(ids, 3)
        wrong, longer = other[:, :3], torch.cat([mask[:, :5], mask.new_ones(2, 3)], 1)
        for _ in range(3):
            model(wrong, attention_mask=longer, **{name: cache})
            cache.crop(-3)
            assert cache.get_seq_length() == 5
        model(ids[:, 5:7], attention_mask=mask[:, :7], **{name: cache})
        cache.crop(-1)
        cache.crop(0)
        last = model(ids[:, 6:], attention_mask=mask, **{name: cache}).logits
    torch.testing.assert_close(last, whole[:, 6:], atol=5e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="past=N"):
        cache.crop(-9)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(2)


def test_without_a_past_the_last_call_can_be_taken_back() -> None:
    model = swapped("linear")
    with torch.no_grad():
        whole = model(IDS).logits
        name, cache = cache_of(model(IDS[:, :5], use_cache=True))
        model(IDS[:, 5:7], **{name: cache})
        with pytest.raises(ValueError, match="keeps 2 of its past"):
            cache.crop(-3)
        cache.crop(-2)
        last = model(IDS[:, 5:], **{name: cache}).logits
        torch.testing.assert_close(last, whole[:, 5:], atol=5e-5, rtol=1e-4)
        cache = cache_of(model(IDS.repeat(1, 30), use_cache=True))[1]
    with pytest.raises(ValueError, match="keeps 0 of its past"):
        cache.crop(-1)
    assert not cache.layers[0].calls


def test_long_pasts_are_bounded() -> None:
    model = swapped("gated_delta", past=2)
    with torch.no_grad():
        name, cache = cache_of(model(IDS, use_cache=True))
        whole = model(torch.cat([IDS, IDS[:, :4]], 1)).logits
        for i in range(4):
            last = model(IDS[:, i : i + 1], **{name: cache}).logits
            held = sum(call.tokens for call in cache.layers[0].calls)
            assert 2 <= held <= 4
    torch.testing.assert_close(last[:, -1], whole[:, -1], atol=5e-5, rtol=1e-4)


def test_rows_are_selected_and_repeated() -> None:
    model = swapped("linear", past=9)
    with torch.no_grad():
        whole = model(IDS).logits
        name, cache = cache_of(model(IDS[:, :5], use_cache=True))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        cache.batch_select_indices(torch.tensor([0, 3]))
        cache.crop(-1)
        last = model(IDS[[1, 1], 4:], **{name: cache}).logits
    torch.testing.assert_close(last, whole[[1, 1], 4:], atol=5e-5, rtol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.filterwarnings("ignore")
def test_guessed_tokens_are_taken_back() -> None:
    model, ids = swapped("linear"), IDS[:1].repeat(1, 3)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    guessed = model.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, guessed)


def test_mixed_layers_share_a_cache() -> None:
    model, inputs = tiny.decoder("Llama"), padded("left")
    adapt.swap(model, "linear", 1)
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    whole = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options), whole)
    adapt.swap(model, "linear", 0)  # the first layer is the one that masks are measured by
    whole = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options), whole)


@pytest.mark.parametrize("mechanism", ["linear", "gated_delta"])
@pytest.mark.parametrize(
    ("kind", "drop", "layers"),
    [
        ("Mistral", "window", None),
        ("Qwen2", (), None),
        ("Gemma2", ("window", "softcap"), None),  # forgotten, as asked for
        ("llava", (), "*language_model*"),
    ],
)
def test_families_generate_with_states(
    kind: str, drop: Any, layers: str | None, mechanism: str
) -> None:
    model, inputs = case(kind, "left")
    torch.manual_seed(2)
    adapt.swap(model, mechanism, layers, drop=drop)
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    whole = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options), whole)


def test_decoders_with_cross_attention() -> None:
    model, inputs = case("whisper", "none")
    torch.manual_seed(1)
    adapt.swap(model, "gated_delta", "*decoder*self_attn")
    adapt.swap(model, "linear", "*encoder_attn")
    features = {"input_features": inputs["input_features"]}
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    whole = model.generate(**features, **options, use_cache=False)
    assert torch.equal(model.generate(**features, **options), whole)


def test_caches_that_cannot_hold_states() -> None:
    model = swapped("linear")
    with pytest.raises(ValueError, match="a DynamicCache"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    plain = tiny.decoder("Llama")
    with torch.no_grad():
        name, cache = cache_of(plain(IDS[:, :5], use_cache=True))
        adapt.swap(plain, "gated_delta")
        with pytest.raises(ValueError, match="5 older keys"):
            plain(IDS[:, 5:6], **{name: cache})
    model = swapped("linear")
    with torch.no_grad():
        name, cache = cache_of(model(IDS[:, :5], use_cache=True))
        adapt.swap(model, "softmax")
        with pytest.raises(ValueError, match="states of another mechanism"):
            model(IDS[:, 5:6], **{name: cache})


def test_a_cache_of_keys_is_continued_by_mechanisms_without_operands() -> None:
    plain = tiny.decoder("Llama")
    with torch.no_grad():
        name, cache = cache_of(plain(IDS[:, :5], use_cache=True))
        adapt.swap(plain, "linear", 0)
        keys = cache.layers[0].keys.clone()
        plain(IDS[:, 5:6], **{name: cache})
        assert torch.equal(cache.layers[0].keys[:, :, :5], keys)
