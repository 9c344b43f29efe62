"""Visual attention redistribution: the authors' numbers, its laws, and a tiny Llava."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import tiny_models as tiny
from golden_files import GOLDEN, parts
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


def test_bad_requests() -> None:
    model = tiny.llava()
    for options, message in (
        ({"keep": 1.5}, r"keep 1\.5"),
        ({"dims": "all"}, "dims 'all'"),
        ({"skip_layers": range(3)}, "no layer is left"),
        ({"image": torch.ones(3)}, "must be a bool mask"),
    ):
        with pytest.raises(ValueError, match=message):
            var.visual_attention_redistribution(model, **options)
    with pytest.raises(ValueError, match="names no image token"):
        var.visual_attention_redistribution(tiny.decoder())
    with pytest.raises(ValueError, match=r"dims \[40\]: must be some of 0 to 31"):
        var.sink_score(torch.ones(1, 2, 32), [40])
