"""Taps read without a trace, edit what they are asked to, and always leave."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import tiny_models as tiny
from regard.lens.tap import Attention, Edit, points, tap

transformers = tiny.transformers
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


def traces(model: torch.nn.Module) -> list[Any]:
    """What a tap changes while it is open."""
    return [
        (module.__dict__.get("config"), len(module._forward_pre_hooks), "forward" in vars(module))
        for module in model.modules()
    ]


@pytest.mark.parametrize(("name", "implementation"), CASES)
@torch.no_grad()
def test_nothing_stays_after_an_exception(name: str, implementation: str) -> None:
    model, inputs = case(name, implementation)
    before, clean = first(model(**inputs)), traces(model)

    def fail(weights: torch.Tensor, attention: Attention) -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), tap(model, edit=Edit(post=fail)):
        model(**inputs)
    after = traces(model)
    assert all(a[0] is c[0] and a[1:] == c[1:] for a, c in zip(after, clean, strict=True))
    assert torch.equal(first(model(**inputs)), before)


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*DECODERS, "bert"])
@torch.no_grad()
def test_padding_on_either_side(name: str, dtype: torch.dtype, padding: str) -> None:
    ids, real = {
        "left": (IDS, REAL),
        "right": (IDS.flip(1), REAL.flip(1)),
        "none": (IDS + 1, torch.ones_like(REAL)),
    }[padding]
    for implementation in ("eager", "sdpa"):
        if (name, implementation) not in CASES:
            continue
        model = case(name, implementation)[0].to(dtype)
        inputs = {"input_ids": ids, "attention_mask": real.long()}
        before = first(model(**inputs))
        seen: list[Attention] = []
        with tap(model, read=seen.append):
            assert torch.equal(first(model(**inputs)), before)
        for attention in seen:
            assert torch.equal(attention.key_mask, real)
            assert torch.equal(attention.query_mask, real)
            assert attention.causal == (name != "bert")


@pytest.mark.parametrize("name", [*DECODERS, "llava", "whisper"])
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_cached_generation(name: str, beams: int) -> None:
    model, inputs = case(name, "sdpa" if (name, "sdpa") in CASES else "eager")
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    last, prompt = (1, 4) if name == "whisper" else (2, len(inputs["input_ids"][0]))
    where = "decoder" if name == "whisper" else "language" if name == "llava" else None
    before = model.generate(**inputs, **options)
    calls = []

    def read(a: Attention) -> None:
        calls.append((a.offset, a.prompt, a.q.shape[2]))
        mixed = a.mix(a.weights, a.heads) * a.query_mask[:, None, :, None]
        assert torch.allclose(mixed, a.output * a.query_mask[:, None, :, None], atol=1e-5)

    with tap(model, read=read, layers=last, kind="self", where=where):
        assert torch.equal(model.generate(**inputs, **options), before)
    assert calls[0] == (0, prompt, prompt)
    assert calls[1:] == [(prompt + n, prompt, 1) for n in range(len(calls) - 1)]
    assert len(calls) in (3, 4)  # Whisper may end early


@torch.no_grad()
def test_cross_attention_of_a_cached_step() -> None:
    model, inputs = case("whisper", "sdpa")
    seen: list[Attention] = []
    with tap(model, kind="cross", read=seen.append):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert {(a.kind, a.offset, a.k.shape[2]) for a in seen} == {("cross", 0, 20)}
    assert not any(a.causal for a in seen)
    assert {a.q.shape[2] for a in seen} == {4, 1}


@torch.no_grad()
def test_two_models_and_two_threads_at_once() -> None:
    (one, inputs), (two, others) = case("Llama", "sdpa"), case("bert", "eager")
    plain = first(one(**inputs)), first(two(**others))
    names: list[str] = []
    zero = Edit(output=lambda o, a: 0 * o)
    with tap(one, edit=zero), tap(two, read=lambda a: names.append(a.name)):
        assert not torch.equal(first(one(**inputs)), plain[0])
        assert torch.equal(first(two(**others)), plain[1])
    assert len(names) == 2
    lengths: dict[int, list[int]] = {}

    def run(count: int) -> None:
        lengths[count] = []
        for _ in range(5):
            one(inputs["input_ids"][1:, :count])

    def read(a: Attention) -> None:
        lengths[a.q.shape[2]].append(a.prompt)

    with tap(one, read=read), ThreadPoolExecutor(2) as pool:
        assert [*pool.map(run, (4, 7))] == [None, None]
    assert lengths == {4: [4] * 15, 7: [7] * 15}
    assert torch.equal(first(one(**inputs)), plain[0])


def test_an_open_tap_is_not_copied_nor_compiled_in() -> None:
    model, inputs = case("Llama", "sdpa")
    seen: list[int] = []
    with tap(model, read=lambda a: seen.append(a.layer)):
        with pytest.raises(RuntimeError, match="close it first"):
            copy.deepcopy(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="a tap of regard stands outside compiled graphs"):
            compiled(**inputs)
    copy.deepcopy(model)
    torch.compiler.reset()


def test_gradients_pass_through_an_edit() -> None:
    model, inputs = case("Llama", "eager")
    strength = torch.zeros(4, 1, 1, requires_grad=True)
    with tap(model, edit=Edit(output=lambda o, a: o * (1 + strength)), layers=1):
        first(model(**inputs)).square().mean().backward()
    assert strength.grad is not None
    assert bool((strength.grad != 0).all())


def test_kinds_and_places() -> None:
    model = tiny.whisper("sdpa")
    found = points(model)
    assert {point.tower for point in found} == {"model.encoder.layers", "model.decoder.layers"}
    assert [point.layer for point in found if point.kind == "cross"] == [0, 1]
    only = tap(model, kind="cross", where="decoder")
    assert [point.name for point in only.points] == [
        f"model.decoder.layers.{n}.encoder_attn" for n in (0, 1)
    ]
    config = transformers.T5Config(
        vocab_size=70, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4
    )
    t5 = points(transformers.T5ForConditionalGeneration(config))
    assert [(point.tower, point.kind, point.layer) for point in t5] == [
        *[("encoder.block", "self", n) for n in (0, 1)],
        *[("decoder.block", kind, n) for n in (0, 1) for kind in ("self", "cross")],
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


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.requires(f"resource:{name}"))
        for name in ("minilm", "vit_small", "whisper_tiny", "reaction_albert")
    ],
)
@torch.no_grad()
def test_pretrained_models(name: str, implementation: str) -> None:
    from regard.testing import resources

    model, *_ = getattr(resources, name)()
    model.set_attn_implementation(implementation)
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 400, (2, 12), generator=made)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids > 40).long()}
    if name == "vit_small":
        inputs = {"pixel_values": torch.randn(2, 3, 224, 224, generator=made)}
    if name == "whisper_tiny":
        features = torch.randn(2, 80, 3000, generator=made)
        inputs = {"input_features": features, "decoder_input_ids": ids}
    before = first(model(**inputs))

    def read(a: Attention) -> None:
        real = a.query_mask[:, None, :, None]
        worst = ((a.mix(a.weights, a.heads) - a.output) * real).abs().max()
        assert worst < 1e-4 * a.output.abs().max()

    with tap(model, read=read):
        assert torch.equal(first(model(**inputs)), before)
    assert torch.equal(first(model(**inputs)), before)
