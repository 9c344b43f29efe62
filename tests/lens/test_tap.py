"""Taps read without a trace, edit what they are asked to, and always leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_models as tiny
from lens.timm_like import VisionTransformer
from regard.lens.tap import Attention, Edit, points, tap
from regard.mixers import Attention as Layer

IDS = torch.tensor([[0, 0, 0, 11, 28, 10, 17, 14, 26], [9, 5, 33, 41, 12, 50, 7, 8, 60]])
REAL = IDS != 0
DECODERS = ("Llama", "Mistral", "Qwen2", "Gemma2", "GptOss")


def case(name: str, implementation: str) -> tuple[Any, dict[str, Any]]:
    made = torch.Generator().manual_seed(1)
    if name in ("bert", "albert"):
        model = getattr(tiny, name)(implementation)
        return model, {"input_ids": IDS.flip(1), "attention_mask": REAL.flip(1).long()}
    if name in ("ViT", "Dinov2"):
        pixels = torch.randn(2, 3, 28, 28, generator=made)
        return tiny.vit(name, implementation), {"pixel_values": pixels}
    if name == "whisper":
        features = torch.randn(2, 8, 40, generator=made)
        ids = torch.tensor([[1, 5, 6, 7], [1, 9, 8, 3]])
        return tiny.whisper(implementation), {"input_features": features, "decoder_input_ids": ids}
    if name == "llava":
        ids = torch.tensor([[1, 5, *[65] * 16, 9, 10], [1, *[65] * 16, 4, 3, 2]])
        pixels = torch.randn(2, 3, 28, 28, generator=made)
        return tiny.llava(implementation), {"input_ids": ids, "pixel_values": pixels}
    return tiny.decoder(name, implementation), {"input_ids": IDS, "attention_mask": REAL.long()}


def first(output: Any) -> torch.Tensor:
    return output.logits if "logits" in output else output[0]


CASES = [
    (name, implementation)
    for name in (*DECODERS, "bert", "albert", "ViT", "Dinov2", "whisper", "llava")
    for implementation in ("eager", "sdpa")
    if not (name in ("Gemma2", "GptOss") and implementation == "sdpa")  # they have no sdpa form
]


@pytest.mark.parametrize(("name", "implementation"), CASES)
@torch.no_grad()
def test_reading_changes_no_bit_and_sees_the_models_weights(name: str, implementation: str) -> None:
    model, inputs = case(name, implementation)
    before = first(model(**inputs))
    seen: list[tuple[str, int, torch.Tensor, torch.Tensor]] = []

    def read(a: Attention) -> None:
        blocks = torch.cat([block for _, block in a.blocks(2)], 2)
        a.given = None  # so that weights are formed again
        again = a.weights
        real = a.query_mask[:, None, :, None]
        assert torch.allclose(blocks * real, again * real, atol=1e-6)
        assert torch.allclose(a.mix(again, a.heads) * real, a.output * real, atol=1e-5)
        seen.append((a.name, a.layer, again * real, real))

    with tap(model, read=read):
        assert torch.equal(first(model(**inputs)), before)
    assert torch.equal(first(model(**inputs)), before)
    assert len(seen) == sum(point.repeats for point in points(model))
    if name in ("whisper", "llava"):
        return
    eager, _ = case(name, "eager")
    with torch.no_grad():
        given = eager(**inputs, output_attentions=True).attentions
    for (_, layer, weights, real), expected in zip(seen, given, strict=True):
        assert torch.allclose(weights, expected * real, atol=1e-6), layer


@pytest.mark.parametrize("name", [*DECODERS, "bert", "albert", "ViT", "Dinov2", "whisper"])
@torch.no_grad()
def test_an_edit_that_changes_nothing(name: str) -> None:
    model, inputs = case(name, "eager")
    before = first(model(**inputs))
    for edit in (
        Edit(pre=lambda s, a: None, post=lambda w, a: None, output=lambda o, a: None),
        Edit(pre=lambda s, a: s.clone(), post=lambda w, a: w.clone(), output=lambda o, a: o * 1),
    ):
        with tap(model, edit=edit):
            assert torch.equal(first(model(**inputs)), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_only_the_heads_and_rows_asked_for_change(implementation: str) -> None:
    model, inputs = case("Llama", implementation)
    plain: dict[int, torch.Tensor] = {}
    with tap(model, read=lambda a: plain.update({a.layer: a.output}), layers=0):
        model(**inputs)
    new: dict[int, torch.Tensor] = {}
    shapes = []

    def post(weights: torch.Tensor, attention: Attention) -> torch.Tensor:
        shapes.append((tuple(weights.shape), attention.heads, attention.rows))
        return torch.full_like(weights, 1 / weights.shape[-1])

    edit = Edit(post=post, heads={0: [1, 3]}, queries=slice(-2, None))
    with tap(model, edit=edit), tap(model, read=lambda a: new.update({0: a.output}), layers=0):
        model(**inputs)
    assert shapes == [((2, 2, 2, 9), [1, 3], range(7, 9))]
    changed = (new[0] != plain[0]).any(-1).any(0)
    expected = torch.zeros(4, 9, dtype=torch.bool)
    expected[[1, 3], -2:] = True
    assert torch.equal(changed, expected)


@torch.no_grad()
def test_edits_reach_the_reported_weights_and_run_before_readers() -> None:
    model, inputs = case("Llama", "eager")
    seen: list[torch.Tensor] = []
    double = Edit(pre=lambda s, a: 2 * s, heads=[0])
    half = Edit(pre=lambda s, a: s / 2)
    reader = tap(model, read=lambda a: seen.append(a.weights), layers=0)
    with reader, tap(model, edit=double, layers=0), tap(model, edit=half, layers=0):
        reported = model(**inputs, output_attentions=True).attentions
    plain = model(**inputs, output_attentions=True).attentions
    assert torch.equal(seen[0], reported[0])
    assert torch.allclose(seen[0][1, 0], plain[0][1, 0], atol=1e-6)
    assert not torch.allclose(seen[0][1, 1], plain[0][1, 1], atol=1e-3)


@torch.no_grad()
def test_nesting_reentry_and_exceptions_leave_the_model_as_it_was() -> None:
    model, inputs = case("Llama", "sdpa")
    before = first(model(**inputs))
    configs = [layer.self_attn.config for layer in model.model.layers]
    zero = Edit(output=lambda o, a: 0 * o)
    one, two = tap(model, edit=zero, layers=1), tap(model, edit=zero)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)  # not the last opened
    assert not torch.equal(first(model(**inputs)), before)
    two.__exit__(None, None, None)
    assert torch.equal(first(model(**inputs)), before)
    with one, one:
        model(**inputs)

    def fail(attention: Attention) -> None:
        raise RuntimeError("inside")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), tap(model, read=fail):
            model(**inputs)
    smaller = tap(model, edit=Edit(post=lambda w, a: w[:1]))
    with pytest.raises(ValueError, match="must give a tensor of shape"), smaller:
        model(**inputs)
    assert torch.equal(first(model(**inputs)), before)
    for layer, config in zip(model.model.layers, configs, strict=True):
        assert layer.self_attn.config is config
        assert not layer.self_attn._forward_pre_hooks
        assert not layer._forward_pre_hooks


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_cached_generation(name: str, beams: int) -> None:
    model, inputs = case(name, "sdpa")
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    before = model.generate(**inputs, **options)
    calls = []
    with tap(model, read=lambda a: calls.append((a.offset, a.prompt, a.q.shape[2])), layers=2):
        assert torch.equal(model.generate(**inputs, **options), before)
    assert calls == [(0, 9, 9), (9, 9, 1), (10, 9, 1), (11, 9, 1)]


def test_kinds_and_places() -> None:
    model = tiny.whisper("sdpa")
    found = points(model)
    assert {point.tower for point in found} == {"model.encoder.layers", "model.decoder.layers"}
    assert [point.layer for point in found if point.kind == "cross"] == [0, 1]
    only = tap(model, kind="cross", where="decoder")
    assert [point.name for point in only.points] == [
        f"model.decoder.layers.{n}.encoder_attn" for n in (0, 1)
    ]
    shared = points(tiny.albert())
    assert [(point.layer, point.repeats) for point in shared] == [(0, 3)]


def test_what_entered_the_block() -> None:
    model, inputs = case("Llama", "eager")
    seen: list[torch.Tensor] = []
    with torch.no_grad(), tap(model, read=lambda a: seen.append(a.hidden)):
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(seen, hidden, strict=False))


def test_bad_requests() -> None:
    model = tiny.decoder()
    nothing = {"read": lambda a: None}
    with pytest.raises(ValueError, match=r"layers \[7\]: the model has layers 0 to 2"):
        tap(model, layers=[1, 7], **nothing)
    with pytest.raises(ValueError, match=r"heads \[4\].*heads 0 to 3"):
        tap(model, edit=Edit(post=lambda w, a: w, heads=[0, 4]))
    with pytest.raises(ValueError, match="no layer of attention of kind 'cross'"):
        tap(model, kind="cross", **nothing)
    with pytest.raises(ValueError, match="Linear has no layer of attention"):
        tap(torch.nn.Linear(2, 2), **nothing)
    with pytest.raises(ValueError, match="kind 'both'"):
        tap(model, kind="both", **nothing)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
        tap("model", **nothing)  # type: ignore[arg-type]
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="not open to taps"), tap(model, **nothing):
        pass


class Explicit(torch.nn.Module):
    """timm's attention with weights of its own."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = other.num_heads, other.qkv, other.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, T, C))


@pytest.mark.parametrize("explicit", [False, True])
@torch.no_grad()
def test_modules_as_timm_has_them(explicit: bool) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=4, num_classes=3
    )
    if explicit:
        for block in model.blocks:
            block.attn = Explicit(block.attn)
    images = torch.randn(2, 3, 28, 28)
    before = model(images)
    seen: list[Attention] = []
    with tap(model, read=seen.append):
        assert torch.equal(model(images), before)
    assert [a.layer for a in seen] == [0, 1]
    for a in seen:
        assert a.q.shape == (2, 4, 17, 8)
        assert a.hidden is not None
        assert torch.allclose(a.mix(a.weights, a.heads), a.output, atol=1e-5)
    with tap(model, edit=Edit(output=lambda o, a: 0 * o)):
        assert not torch.allclose(model(images), before)
    assert torch.equal(model(images), before)
    assert all("forward" not in block.attn.__dict__ for block in model.blocks)


@pytest.mark.parametrize("options", [{}, {"window": (2, 0)}])
@torch.no_grad()
def test_our_own_layers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = Layer(32, 4, kv_heads=2, causal=True, rope=True, options=options)
    x, mask = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    before, card = layer(x, key_mask=mask), layer.card
    seen: list[Attention] = []
    with tap(layer, read=seen.append):
        assert torch.equal(layer(x, key_mask=mask), before)
        _, state = layer(x[:, :4], key_mask=mask[:, :4], return_state=True)
        layer(x[:, 4:], key_mask=mask[:, 4:], state=state)
    assert layer.card is card
    whole, _, last = seen
    real = whole.query_mask[:, None, :, None]
    assert torch.equal(whole.query_mask, mask)
    assert torch.allclose(whole.mix(whole.weights, whole.heads) * real, whole.output, atol=1e-5)
    assert last.offset == 4
    assert torch.allclose(last.weights[1], whole.weights[1, :, 4:], atol=1e-5)


@torch.no_grad()
def test_other_mechanisms_have_outputs_but_no_weights() -> None:
    layer = Layer(16, 2, mechanism="local_linear", causal=True)
    seen: list[Attention] = []
    with tap(layer, read=seen.append):
        layer(torch.randn(1, 5, 16))
    assert seen[0].output.shape == (1, 2, 5, 8)
    with pytest.raises(ValueError, match="mechanism is 'local_linear'"):
        _ = seen[0].weights
