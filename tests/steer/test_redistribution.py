"""Visual attention redistribution: the authors' numbers, its laws, and a tiny Llava."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import tiny_models as tiny
from golden_files import GOLDEN, parts
from regard.lens.tap import tap
from regard.steer import act_calibration, edit
from regard.steer import redistribution as var

transformers = tiny.transformers
NAME = "visual_attention_redistribution"


def described(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / NAME / f"{name}.json").read_text())


def span(start: int, count: int, total: int) -> torch.Tensor:
    mask = torch.zeros(1, total, dtype=torch.bool)
    mask[:, start : start + count] = True
    return mask


def test_maps_of_the_authors() -> None:
    data, told = parts(f"{NAME}/redistribute"), described("redistribute")
    hp, given, out = told["hp"], data["in"], data["out"]
    hidden = given["hidden_states"]
    sinks = var.sink_score(hidden, told["sink_dims"]) > hp["tau"]
    assert torch.equal(sinks[0].nonzero().flatten(), out["sink_indices"])
    start, count = told["image_start"], told["image_len"]
    for step in ("prefill", "decode"):
        weights = given[f"attention_{step}"]
        S = weights.shape[-1]
        image = span(start, count, S)
        marks = torch.nn.functional.pad(sinks, (0, S - sinks.shape[1]))
        rows = var.image_centric_heads(weights, marks, image, hp["rho"], hp["summ"])
        assert torch.equal(rows.nonzero(), out[f"heads_{step}"])
        if step == "prefill":
            rows = rows & (torch.arange(S) >= start + count)
        new = var.redistribute(weights, marks, image, rows, hp["p"])
        assert torch.allclose(new, out[f"attention_{step}"], rtol=0, atol=told["tol"])


def test_a_llama_of_the_authors() -> None:
    data, told = parts(f"{NAME}/llama_embeds"), described("llama_embeds")
    config = transformers.LlamaConfig(**told["config"], attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(data["state"])
    embeds, hp, out, tol = data["in"]["inputs_embeds"], told["hp"], data["out"], told["tol"]
    image = span(told["image_start"], told["image_len"], embeds.shape[1])
    options = {"tau": hp["tau"], "rho": hp["rho"], "min_mass": hp["summ"], "keep": hp["p"]}
    steering = var.visual_attention_redistribution(
        model, told["sink_dims"], image=image, skip_last=False, **options
    )
    with torch.no_grad():
        base = model(inputs_embeds=embeds).logits
        assert torch.allclose(base, out["logits_base"], rtol=0, atol=tol)
        with steering:
            first = model(inputs_embeds=embeds, use_cache=True, output_attentions=True)
            after = model(
                inputs_embeds=data["in"]["next_embed"],
                output_attentions=True,
                **tiny.cached(model, first.past_key_values),
            )
        assert torch.equal(model(inputs_embeds=embeds).logits, base)
    assert torch.allclose(first.logits, out["logits_var"], rtol=0, atol=tol)
    assert torch.allclose(after.logits, out["logits_var_next"], rtol=0, atol=tol)
    for layer in (2, 3):
        assert torch.equal(steering.sinks[layer][0].nonzero().flatten(), out[f"sinks{layer}"])
        assert torch.allclose(first.attentions[layer], out[f"attn{layer}"], rtol=0, atol=tol)
        assert torch.allclose(after.attentions[layer], out[f"attn_next{layer}"], rtol=0, atol=tol)


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, 9, 20, generator=made, dtype=torch.float64).softmax(-1)
    sinks = torch.zeros(2, 20, dtype=torch.bool)
    sinks[0, [0, 5, 7]], sinks[1, [1, 6]] = True, True
    image = torch.cat([span(4, 8, 20), span(6, 8, 20)])
    return weights, sinks, image


def test_laws_of_the_edit() -> None:
    weights, sinks, image = example()
    every = var.image_centric_heads(weights, sinks, image, rho=1.0, min_mass=0.0)
    assert every.all()
    none = var.image_centric_heads(weights, sinks & ~image, image, 1.0, 0.0)
    assert not none.any()
    some = var.image_centric_heads(weights, sinks, image, 0.2, 0.4)
    assert some.any()
    assert not some.all()
    new = var.redistribute(weights, sinks, image, some)
    assert torch.allclose(new.sum(-1), torch.ones((), dtype=torch.float64), atol=1e-12)
    assert torch.equal(new[~some], weights[~some])
    text = (~image & ~sinks)[:, None, None].expand_as(weights)
    assert torch.equal(new[text], weights[text])
    assert torch.allclose(var.redistribute(weights, sinks, image, some, 1.0), weights)


def test_partial_sums() -> None:
    weights, sinks, image = example()
    values = torch.randn(20, 4, dtype=torch.float64)
    every = torch.ones(2, 3, 9, dtype=torch.bool)
    new = var.redistribute(weights, sinks, image, every) @ values
    for b in range(2):
        other = image[b] & ~sinks[b]
        part = var.redistribute_output(
            weights[b] @ values,
            weights[b][..., sinks[b]],
            values[sinks[b]],
            weights[b][..., other],
            values[other],
        )
        assert torch.allclose(part, new[b], atol=1e-12)


def test_relevant_over_sink_grows_exactly() -> None:
    weights = torch.tensor([0.3, 0.4, 0.1, 0.05, 0.15], dtype=torch.float64).view(1, 1, 1, 5)
    sinks, image = torch.zeros(1, 5, dtype=torch.bool), span(1, 3, 5)
    sinks[0, 1] = True
    chosen = var.image_centric_heads(weights, sinks, image, rho=0.8)
    new = var.redistribute(weights, sinks, image, chosen, 0.6)[0, 0, 0]
    factor = 0.4 * 0.4 / 0.15
    assert float(new[2] / new[1]) == pytest.approx(0.25 * (1 + factor) / 0.6)


# -- a tiny Llava ----------------------------------------------------------------------------


def planted(implementation: str = "eager") -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Llava whose projector makes patches 3 and 9 massive in dimension 11, and BOS too."""
    model = tiny.llava(implementation, num_hidden_layers=5)

    def swell(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[..., [3, 9], 11] = 60.0
        return out

    model.model.multi_modal_projector.register_forward_hook(swell)
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[1, 11] = 60.0
    ids = torch.tensor([[1, 5, *[65] * 16, 9, 10, 11]])
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    return model, ids, pixels


@torch.no_grad()
def test_planted_sinks_are_found_and_steered() -> None:
    model, ids, pixels = planted("sdpa")
    inputs = {"input_ids": ids, "pixel_values": pixels[:1]}
    assert var.sink_dimensions(model, **inputs, times=5.0) == (11,)
    base = model(**inputs).logits
    options = {"tau": 3.0, "rho": 1.0, "min_mass": 0.0}
    with var.visual_attention_redistribution(model, [11], **options) as context:
        steered = model(**inputs).logits
    assert set(context.sinks) == {2, 3}
    assert context.sinks[2][0].nonzero().flatten().tolist() == [0, 5, 11]
    assert torch.equal(steered[:, :18], base[:, :18])
    assert not torch.allclose(steered[:, 18:], base[:, 18:], atol=1e-5)
    assert torch.equal(model(**inputs).logits, base)
    with var.visual_attention_redistribution(model, [11], keep=1.0, **options):
        assert torch.equal(model(**inputs).logits, base)
    with var.visual_attention_redistribution(model, tau=1e9):
        pass  # "auto" asks nothing of the model before it runs


@torch.no_grad()
def test_a_batch_is_its_rows_alone_and_generation_reuses_the_sinks() -> None:
    model, ids, pixels = planted()
    other = torch.tensor([[0, 0, 1, *[65] * 16, 4, 7]])
    both, mask = torch.cat([ids, other]), torch.ones(2, 21, dtype=torch.long)
    mask[1, :2] = 0
    options = {"tau": 3.0, "rho": 1.0, "min_mass": 0.0}
    with var.visual_attention_redistribution(model, [11], **options):
        batch = model(input_ids=both, pixel_values=pixels, attention_mask=mask).logits
        one = model(input_ids=ids, pixel_values=pixels[:1]).logits
        two = model(input_ids=other[:, 2:], pixel_values=pixels[1:]).logits
        inputs = {"input_ids": ids, "pixel_values": pixels[:1]}
        text = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.allclose(batch[:1], one, atol=1e-5)
    assert torch.allclose(batch[1:, 2:], two, atol=1e-5)
    assert text.shape == (1, 24)


OPTIONS = {"tau": 3.0, "rho": 1.0, "min_mass": 0.0}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_padding_on_either_side(implementation: str, side: str) -> None:
    model, ids, pixels = planted(implementation)
    other = torch.tensor([[1, *[65] * 16, 4, 7]])
    pad = (2, 0) if side == "left" else (0, 2)
    both = torch.cat([ids, torch.nn.functional.pad(other, pad)])
    mask = torch.cat([torch.ones_like(ids), torch.nn.functional.pad(torch.ones_like(other), pad)])
    with var.visual_attention_redistribution(model, [11], **OPTIONS):
        batch = model(input_ids=both, pixel_values=pixels, attention_mask=mask).logits
        alone = model(input_ids=other, pixel_values=pixels[1:]).logits
    real = slice(2, None) if side == "left" else slice(0, 19)
    assert torch.allclose(batch[1:, real], alone, atol=1e-5)
    plain = model(input_ids=other, pixel_values=pixels[1:]).logits
    assert not torch.allclose(plain, alone, atol=1e-4)


@torch.no_grad()
def test_cached_steps_are_the_edit_by_hand() -> None:
    model, ids, pixels = planted("sdpa")
    inputs, more = {"input_ids": ids, "pixel_values": pixels[:1]}, torch.tensor([[8, 3]])
    with var.visual_attention_redistribution(model, [11], keep=0.3, **OPTIONS) as context:
        cache = model(**inputs, use_cache=True).past_key_values
        found = dict(context.sinks)
        steps = [model(more[:, n : n + 1], **tiny.cached(model, cache)).logits for n in (0, 1)]
        assert all(torch.equal(context.sinks[layer], sinks) for layer, sinks in found.items())
    image = span(2, 16, 23)

    def post(weights: torch.Tensor, attention: Any) -> torch.Tensor:
        sinks = torch.nn.functional.pad(found[attention.layer], (0, 2))
        rows = (torch.arange(23) >= 18).expand(1, weights.shape[1], -1)
        return var.redistribute(weights, sinks, image, rows, 0.3)

    inputs["input_ids"] = torch.cat([ids, more], 1)
    with edit(model, post=post, layers=[2, 3], where="language_model"):
        whole = model(**inputs).logits
    assert torch.allclose(torch.cat(steps, 1), whole[:, 21:], atol=1e-5)


@pytest.mark.parametrize("dims", [[11], "attention"])
@torch.no_grad()
def test_generation_with_and_without_a_cache(dims: list[int] | str) -> None:
    model, ids, pixels = planted("sdpa")
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True, "input_ids": ids, "pixel_values": pixels[:1]}
    choice = OPTIONS | {"alpha": 1.0}
    with var.visual_attention_redistribution(model, dims, **choice):
        cached = model.generate(**options)
    with var.visual_attention_redistribution(model, dims, prompt=21, **choice):
        whole = model.generate(use_cache=False, **options)
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.logits, whole.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    plain = model.generate(**options)
    assert not torch.allclose(plain.logits[0], cached.logits[0], atol=1e-4)


@torch.no_grad()
def test_without_its_sinks_the_image_is_what_the_other_patches_say() -> None:
    """keep = 0 takes all from the sinks, and their values no longer matter after the image."""
    model, ids, pixels = planted("sdpa")
    inputs = {"input_ids": ids, "pixel_values": pixels[:1]}
    seen: dict[int, torch.Tensor] = {}
    reading = tap(
        model, read=lambda a: seen.update({a.layer: a.weights}), layers=[2, 3], where="language"
    )
    with reading:
        model(**inputs)
        before = dict(seen)
        with var.visual_attention_redistribution(model, [11], keep=0.0, **OPTIONS):
            model(**inputs)
    [sinks] = [[0, 5, 11]]
    patches = [j for j in range(2, 18) if j not in sinks]
    rows = slice(18, None)
    assert float(seen[2][:, :, rows][..., sinks].abs().max()) == 0
    gained = seen[2][:, :, rows][..., patches].sum(-1) - before[2][:, :, rows][..., patches].sum(-1)
    assert torch.allclose(gained, before[2][:, :, rows][..., sinks].sum(-1), atol=1e-6)
    # As if the sinks were hidden and what they had were the other patches': a mask does the first.
    hide = torch.zeros(1, 1, 1, 21).index_fill(
        -1, torch.tensor(sinks), torch.finfo(torch.float32).min
    )
    masked = edit(
        model,
        pre=lambda scores, a: scores + hide,
        queries=slice(18, None),
        layers=[2],
        where="language",
    )
    with reading, masked:
        model(**inputs)
    among = [part[:, :, rows][..., patches] for part in (seen[2], before[2])]
    shares = [part / part.sum(-1, keepdim=True) for part in among]
    assert torch.allclose(shares[0], shares[1], atol=1e-6)


@torch.no_grad()
def test_sinks_of_a_prompt_and_dimensions_found_by_themselves() -> None:
    model, ids, pixels = planted("sdpa")
    inputs = {"input_ids": ids, "pixel_values": pixels[:1]}
    found = var.find_visual_sinks(model, dims=[11], tau=3.0, **inputs)
    assert set(found) == {2, 3, 4}
    assert found[2][0].nonzero().flatten().tolist() == [5, 11]
    # (ten times the median is more than 60 in one dimension of 32 gives)
    model.model.language_model.embed_tokens.weight[1, 11] = 600.0
    assert var.sink_dimensions(model, **inputs) == (11,)
    auto = var.visual_attention_redistribution(model, **OPTIONS)
    told = var.visual_attention_redistribution(model, [11], **OPTIONS)
    for _ in range(2):
        with auto:
            logits = model(**inputs).logits
        assert auto.dims == (11,)
        with told:
            assert torch.equal(model(**inputs).logits, logits)


@torch.no_grad()
def test_where_no_dimension_stands_out_sinks_are_told_by_attention() -> None:
    model = tiny.llava("eager", num_hidden_layers=4)
    ids = torch.tensor([[1, 5, *[65] * 16, 9, 10]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}
    with pytest.raises(var.NoMassiveDimension, match="no dimension of the first token stands out"):
        var.sink_dimensions(model, **inputs, times=1e3)
    seen: list[torch.Tensor] = []
    choice = OPTIONS | {"alpha": 1.0, "skip_last": False}
    auto = var.visual_attention_redistribution(model, **choice)
    with tap(model, read=lambda a: seen.append(a.weights), layers=[2], where="language"):
        model(**inputs)
    with auto:
        steered = model(**inputs).logits
    by_hand = seen[0].mean(1).sum(1) / torch.arange(20, 0, -1) > 1 / 20
    assert auto.dims == ()
    assert torch.equal(auto.sinks[2], by_hand)
    with var.visual_attention_redistribution(model, "attention", **choice):
        assert torch.equal(model(**inputs).logits, steered)
    assert not torch.allclose(model(**inputs).logits, steered, atol=1e-4)


@torch.no_grad()
def test_leaving_nesting_and_two_models() -> None:
    (one, ids, pixels), two = planted(), tiny.decoder()
    inputs, text = {"input_ids": ids, "pixel_values": pixels[:1]}, torch.tensor([[5, 9, 11, 7]])
    plain = one(**inputs).logits, two(text).logits
    steering = var.visual_attention_redistribution(one, [11], **OPTIONS)
    with steering:
        steered = one(**inputs).logits
    with steering, act_calibration(two, theta=0.1), act_calibration(one, beta=1.0):
        assert torch.equal(one(**inputs).logits, steered)
        assert not torch.equal(two(text).logits, plain[1])
    wrong = {"input_ids": ids, "pixel_values": pixels}  # two images, places for one
    with pytest.raises(ValueError, match="Image features and image tokens"), steering:
        one(**wrong)
    assert torch.equal(one(**inputs).logits, plain[0])
    assert torch.equal(two(text).logits, plain[1])
    assert not one._forward_pre_hooks
    cache = one(**inputs, use_cache=True).past_key_values
    with steering, pytest.raises(ValueError, match="run it inside too"):
        one(text[:, :1], **tiny.cached(one, cache))


def test_bad_requests() -> None:
    model = tiny.llava()
    for options, message in (
        ({"keep": 1.5}, r"keep 1\.5"),
        ({"dims": "all"}, "dims 'all'"),
        ({"dims": []}, r"dims \[\]"),
        ({"prompt": 0}, "prompt 0"),
        ({"alpha": 0.0}, r"alpha 0\.0"),
        ({"skip_layers": range(3)}, "no layer is left"),
        ({"image": torch.ones(3)}, "must be a bool mask"),
    ):
        with pytest.raises(ValueError, match=message):
            var.visual_attention_redistribution(model, **options)
    with pytest.raises(ValueError, match="names no image token"):
        var.visual_attention_redistribution(tiny.decoder())
    with pytest.raises(ValueError, match=r"dims \[40\]: must be some of 0 to 31"):
        var.sink_score(torch.ones(1, 2, 32), [40])
