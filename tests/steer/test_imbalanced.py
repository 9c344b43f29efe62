"""The imbalanced-attention fix: the authors' numbers, its laws, and a tiny Llava."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import tiny_models as tiny
from golden_files import GOLDEN, parts
from regard.lens.tap import tap
from regard.steer import imbalanced as fix
from regard.steer.sensitivity import head_gains, head_sensitivity
from regard.steer.text_contrast import contrast_logits, contrast_with_text

transformers = tiny.transformers
NAME = "imbalanced_attention_fix"


def described(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / NAME / f"{name}.json").read_text())


def marks(indices: Any, total: int, start: int = 0) -> torch.Tensor:
    mask = torch.zeros(1, total, dtype=torch.bool)
    mask[0, start + torch.as_tensor(indices, dtype=torch.long)] = True
    return mask


def test_token_sets_of_the_authors() -> None:
    data, told = parts(f"{NAME}/token_selection"), described("token_selection")
    given, out = data["in"], data["out"]
    sets = fix.select_visual_tokens(
        given["vit_attn_first"],
        given["vit_attn_penultimate"],
        local_ratio=told["local_token_ratio"],
    )
    assert torch.equal(sets.top[0].nonzero().flatten(), out["top_tokens_sorted"])
    assert torch.equal(sets.bottom[0].nonzero().flatten(), out["bottom_tokens_sorted"])
    assert torch.allclose(sets.outlier_ratio, out["outlier_ratio"])


def test_attention_of_the_authors() -> None:
    data, told = parts(f"{NAME}/attention_edit"), described("attention_edit")
    given, out, tol = data["in"], data["out"], told["tol"]
    config = transformers.LlamaConfig(
        **{**tiny.TEXT, "num_key_value_heads": told["num_heads"], "num_hidden_layers": 1},
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval().model
    layer = model.layers[0].self_attn
    layer.load_state_dict(data["state"])
    model.layers[0].input_layernorm = torch.nn.Identity()
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _, __, result: seen.append(result[0]))
    n, start = told["image_len"], told["image_start"]
    image = marks(range(n), 19, start)
    tokens = marks(given["top_tokens"], n), marks(given["bottom_tokens"], n)
    options = {"alpha": told["alpha"], "beta": told["beta"], "image": image, "layers": [0]}
    with torch.no_grad():
        hidden = given["hidden_states"]
        plain = model(inputs_embeds=hidden, output_attentions=True).attentions[0]
        with fix.visual_boost(model, tokens=tokens, **options):
            new = model(inputs_embeds=hidden, output_attentions=True).attentions[0]
            model.set_attn_implementation("sdpa")
            model(inputs_embeds=hidden)
    assert torch.allclose(plain, out["attn_base"], rtol=0, atol=tol)
    assert torch.allclose(new, out["attn"], rtol=0, atol=tol)
    assert torch.equal(new[:, :, :-1], plain[:, :, :-1])
    assert torch.allclose(seen[0], out["hidden_base"], rtol=0, atol=tol)
    for result in seen[1:]:
        assert torch.allclose(result, out["hidden"], rtol=0, atol=tol)


def test_contrast_of_the_authors() -> None:
    data, told = parts(f"{NAME}/cfg_logits"), described("cfg_logits")
    given = data["in"]
    new = contrast_logits(given["scores"], given["uncond_logits_last"], told["guidance_scale"])
    assert torch.allclose(new, data["out"]["scores"], rtol=0, atol=told["tol"])
    same = contrast_logits(given["scores"], given["uncond_logits_last"], 1.0)
    assert torch.equal(same, given["scores"].log_softmax(-1))


def test_laws_of_the_boost() -> None:
    scores = torch.randn(2, 3, 1, 12, generator=torch.Generator().manual_seed(0)).double()
    least = torch.finfo(scores.dtype).min
    scores[..., 11] = least
    top, bottom = marks([1, 2, 11], 12).expand(2, -1), marks([2, 5], 12).expand(2, -1)
    assert torch.equal(fix.boost_scores(scores, top, bottom, 0.0, 0.0), scores)
    ones = fix.boost_scores(scores, top, bottom, head_gain=torch.ones(3))
    assert torch.equal(ones, fix.boost_scores(scores, top, bottom))
    assert float(ones[..., 11].max()) == least
    assert torch.allclose(ones[..., 2], scores[..., 2] + 0.3 * scores[..., 2].abs())
    some = fix.boost_scores(scores, top, bottom, head_gain=torch.tensor([1.0, 0.0, 2.0]))
    assert torch.equal(some[:, 1], scores[:, 1])
    masses = [
        float(fix.boost_scores(scores, top, bottom, a, 0.0).softmax(-1)[..., 1].sum())
        for a in (0.0, 0.3, 0.7, 2.0)
    ]
    assert masses == sorted(masses)
    z = torch.tensor([2.0, 1.0, -3.0]).view(1, 1, 1, 3).double()
    both = fix.boost_scores(z, marks([0, 1], 3), marks([], 3), 0.7).softmax(-1).flatten()
    assert float(both[0] / both[1]) == pytest.approx(math.exp(1.7))


def test_planted_outliers() -> None:
    weights = torch.full((2, 3, 26, 26), 1 / 26)
    weights[0, :, 0, [4, 9, 20]] = 0.5  # patches 3, 8 and 19
    weights[1, :, 0, 7] = 0.5
    weights[:, :, 0] += 0.001 * torch.rand(26, generator=torch.Generator().manual_seed(0))
    sets = fix.select_visual_tokens(weights, weights)
    assert sets.bottom[0].nonzero().flatten().tolist() == [3, 8, 19]
    assert sets.bottom[1].nonzero().flatten().tolist() == [6]
    assert not (sets.top & sets.bottom).any()
    spatial = fix.select_visual_tokens(weights, weights, local_ratio=0, spatial_ratio=0.2)
    assert int(spatial.top[0].sum()) == 5 - int((spatial.bottom[0]).sum())
    assert int(fix.select_visual_tokens(weights, weights, summary=4).bottom[0].sum()) == 4
    with pytest.raises(ValueError, match="summary 'top'"):
        fix.select_visual_tokens(weights, weights, summary="top")  # type: ignore[arg-type]


def test_head_gains() -> None:
    seen = torch.tensor([[0.1, 0.2, 0.4], [0.3, 0.3, 0.3]])
    weak, strong = head_gains(seen, "weak"), head_gains(seen, "strong")
    assert torch.allclose(weak.mean(1), torch.ones(2))
    assert torch.allclose(strong.mean(1), torch.ones(2))
    assert weak[0, 0] > weak[0, 1] > weak[0, 2] == 0
    assert strong[0, 0] < strong[0, 1] < strong[0, 2]
    assert torch.equal(head_gains(seen), torch.ones(2, 3))


IDS = torch.tensor([[1, 5, *[65] * 16, 9, 10, 11]])
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_tiny_llava(implementation: str) -> None:
    model = tiny.llava(implementation)
    inputs = {"input_ids": IDS, "pixel_values": PIXELS[:1]}
    base = model(**inputs).logits
    with fix.visual_boost(model):
        boosted = model(**inputs).logits
        text = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        beams = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=2)
    assert text.shape == beams.shape == (1, 26)
    assert torch.equal(boosted[:, :-1], base[:, :-1])
    assert not torch.allclose(boosted[:, -1], base[:, -1], atol=1e-4)
    eager = tiny.llava("eager")
    with fix.visual_boost(eager):
        assert torch.allclose(eager(**inputs).logits, boosted, atol=1e-5)
    with fix.visual_boost(model, alpha=0, beta=0):
        assert torch.equal(model(**inputs).logits, base)
    every = torch.ones(1, 16, dtype=torch.bool)
    with fix.visual_boost(model, tokens=(every, ~every)):
        all_of_them = model(**inputs).logits
    with fix.visual_boost(model, mode="pai"):
        assert torch.equal(model(**inputs).logits, all_of_them)
    with fix.visual_boost(model, head_gain=torch.ones(4)):
        assert torch.equal(model(**inputs).logits, boosted)
    assert torch.equal(model(**inputs).logits, base)


BATCH = torch.cat([IDS, torch.tensor([[0, 0, 1, *[65] * 16, 4, 7]])])
REAL = torch.ones(2, 21, dtype=torch.long)
REAL[1, :2] = 0


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_batch_is_its_rows_alone(implementation: str) -> None:
    model = tiny.llava(implementation)
    with fix.visual_boost(model):
        batch = model(input_ids=BATCH, pixel_values=PIXELS, attention_mask=REAL).logits
        texts = model.generate(
            input_ids=BATCH, pixel_values=PIXELS, attention_mask=REAL, max_new_tokens=4
        )
        one = model(input_ids=IDS, pixel_values=PIXELS[:1]).logits
        two = model(input_ids=BATCH[1:, 2:], pixel_values=PIXELS[1:]).logits
        text = model.generate(input_ids=BATCH[1:, 2:], pixel_values=PIXELS[1:], max_new_tokens=4)
    assert torch.allclose(batch[:1], one, atol=1e-5)
    assert torch.allclose(batch[1:, 2:], two, atol=1e-5)
    assert torch.equal(texts[1:, 2:], text)
    alone = torch.tensor([[1, 5, *[9] * 16, 9, 10, 11]])  # one of the batch has no image
    mixed = torch.cat([alone, IDS])
    with fix.visual_boost(model):
        got = model(input_ids=mixed, pixel_values=PIXELS[:1]).logits
        assert torch.equal(model(input_ids=alone).logits, _plain(model, alone))
    assert torch.allclose(got[1:], one, atol=1e-5)
    assert torch.allclose(got[:1], _plain(model, alone), atol=1e-5)


def _plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_cached_step_is_the_last_row_of_a_whole_run(kind: str) -> None:
    model = tiny.llava(kind)
    inputs = {"input_ids": IDS, "pixel_values": PIXELS[:1]}
    seen: list[torch.Tensor] = []
    reader = tap(
        model,
        read=lambda a: seen.append(a.weights_of(rows=range(a.q.shape[2] - 1, a.q.shape[2]))),
        layers=[2],
        where="language_model",
    )
    with fix.visual_boost(model, layers=[2]), reader:
        text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        cached = list(seen)
        for step, row in enumerate(cached):
            # Earlier rows were changed in their turn: only the last layer is, so that its row
            # of a run without a cache sees the same keys.
            seen.clear()
            model(input_ids=text[:, : 21 + step], pixel_values=PIXELS[:1])
            assert torch.allclose(row, seen[0], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_needs_no_cache(beams: int) -> None:
    model = tiny.llava("sdpa")
    inputs = {"input_ids": BATCH, "pixel_values": PIXELS, "attention_mask": REAL}
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    plain = model.generate(**inputs, **options)
    # Only the last layer is boosted, so that the earlier tokens' keys are those of a cache.
    with fix.visual_boost(model, layers=[2]):
        cached = model.generate(**inputs, **options)
        anew = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached, anew)
    assert not torch.equal(cached, plain)
    assert torch.equal(model.generate(**inputs, **options), plain)


@torch.no_grad()
def test_heads_that_are_left_alone() -> None:
    model = tiny.llava("sdpa")
    inputs = {"input_ids": IDS, "pixel_values": PIXELS[:1]}
    seen: list[torch.Tensor] = []
    reader = tap(model, read=lambda a: seen.append(a.output), layers=[2], where="language_model")
    gain = torch.tensor([1.0, 0.0, 2.0, 0.0])
    with reader:
        model(**inputs)
        with fix.visual_boost(model, head_gain=gain):
            model(**inputs)
        with fix.visual_boost(model, head_gain=gain.expand(3, 4)):
            model(**inputs)
    plain, new, again = seen
    assert torch.equal(new, again)
    assert torch.equal(new[:, [1, 3]], plain[:, [1, 3]])
    assert (new[:, [0, 2], -1] != plain[:, [0, 2], -1]).any(-1).all()


@torch.no_grad()
def test_sensitivity_of_heads() -> None:
    model = tiny.llava("sdpa")
    prompts = [
        {"input_ids": IDS, "pixel_values": PIXELS[:1]},
        {"input_ids": BATCH, "pixel_values": PIXELS, "attention_mask": REAL},
    ]
    found = head_sensitivity(model, prompts, max_new_tokens=3)
    assert found.shape == (3, 4)
    eager, sums = tiny.llava("eager"), torch.zeros(3, 4)
    for ids, pixels in ((IDS, PIXELS[:1]), (IDS, PIXELS[:1]), (BATCH[1:, 2:], PIXELS[1:])):
        text = eager.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3)
        for step in range(3):
            part = text[:, : ids.shape[1] + step]
            maps = eager(input_ids=part, pixel_values=pixels, output_attentions=True).attentions
            image = part[0] == 65
            sums += torch.stack([weights[0, :, -1, image].sum(-1) for weights in maps])
    assert torch.allclose(found, sums / 9, atol=1e-5)
    with fix.visual_boost(model, head_gain=head_gains(found, "weak")):
        model(**prompts[0])
    with pytest.raises(ValueError, match="there are none"):
        head_sensitivity(model, [])


@torch.no_grad()
def test_contrast_beside_a_boosted_generation() -> None:
    model = tiny.llava("sdpa")
    inputs = {"input_ids": BATCH, "pixel_values": PIXELS, "attention_mask": REAL}
    text = {"input_ids": torch.tensor([[1, 5, 9, 10, 11], [0, 0, 1, 4, 7]])}
    text["attention_mask"] = (text["input_ids"] != 0).long()
    options = {"max_new_tokens": 4, "do_sample": False}
    with fix.visual_boost(model) as boost:
        contrast = contrast_with_text(model, text, 21, gamma=2.0, boost=boost)
        got = model.generate(
            **inputs,
            **options,
            logits_processor=[contrast],
            output_scores=True,
            return_dict_in_generate=True,
        )
        beams = contrast_with_text(model, text, 21, gamma=2.0, boost=boost)
        model.generate(**inputs, **options, num_beams=2, logits_processor=[beams])
        same = contrast_with_text(model, text, 21, gamma=1.0, boost=boost)
        unchanged = model.generate(**inputs, **options, logits_processor=[same])
        assert torch.equal(unchanged, model.generate(**inputs, **options))
    for row, prompt in enumerate(([1, 5, 9, 10, 11], [1, 4, 7])):
        ids = torch.tensor([prompt])
        image, start = BATCH[row : row + 1], 2 * row
        for step, scores in enumerate(got.scores):
            new = got.sequences[row : row + 1, 21 : 21 + step]
            plain = model(input_ids=torch.cat([ids, new], 1)).logits[:, -1]
            # The scores with the image: of one step, after a prompt and steps as generated.
            alone = {"input_ids": image[:, start:], "pixel_values": PIXELS[row : row + 1]}
            with fix.visual_boost(model):
                with_image = model.generate(
                    **alone,
                    max_new_tokens=step + 1,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                    prefix_allowed_tokens_fn=lambda _, so_far, a=row, n=21 - start: [
                        int(got.sequences[a, 21 + len(so_far) - n])
                    ],
                ).logits[step]
            expected = contrast_logits(with_image, plain, 2.0)
            assert torch.allclose(scores[row : row + 1], expected, atol=1e-4)
    with pytest.raises(ValueError, match="2 prompts, for a batch of 1"):
        contrast_with_text(model, text, 21)(IDS, torch.zeros(1, 70))


def test_bad_requests() -> None:
    model = tiny.llava()
    with pytest.raises(ValueError, match="mode 'both'"):
        fix.visual_boost(model, mode="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be negative"):
        fix.visual_boost(model, alpha=-1)
    with pytest.raises(ValueError, match=r"layers \[9\]"):
        fix.visual_boost(model, layers=[9])
    image = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="no vision tower"):
        fix.visual_boost(tiny.decoder(), image=image)
    with pytest.raises(ValueError, match="layers: none to change"):
        fix.visual_boost(tiny.decoder(num_hidden_layers=2), image=image, mode="pai")
    with pytest.raises(ValueError, match=r"head_gain of shape \[3\]"):
        fix.visual_boost(model, head_gain=torch.ones(3))


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.tensor([[1] * 20 + [0]])}, "padded on the right"),
        ({"input_ids": torch.tensor([[1, *[65] * 8, 5]]), "pixel_values": None}, "did not run"),
    ],
)
def test_prompts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    model = tiny.llava("sdpa")
    inputs = {"input_ids": IDS, "pixel_values": PIXELS[:1], **changes}
    before = _plain(model, IDS[:, -3:])
    with fix.visual_boost(model), pytest.raises(ValueError, match=message):
        model(**inputs)
    assert torch.equal(_plain(model, IDS[:, -3:]), before)  # nothing is left behind


@torch.no_grad()
def test_caches_from_elsewhere() -> None:
    model = tiny.llava("sdpa")
    inputs = {"input_ids": IDS, "pixel_values": PIXELS[:1]}
    cache = transformers.DynamicCache()
    model(**inputs, **tiny.cached(model, cache))
    with fix.visual_boost(model, mode="pai"), pytest.raises(ValueError, match="run outside"):
        model(input_ids=IDS[:, -1:], **tiny.cached(model, cache))
    cache = transformers.DynamicCache()
    with fix.visual_boost(model):
        model(**inputs, **tiny.cached(model, cache))
        model(input_ids=IDS[:, -2:], **tiny.cached(model, cache))  # text may go on
        with pytest.raises(ValueError, match="image after the prompt"):
            model(**inputs, **tiny.cached(model, cache))
    two = torch.ones(2, 16, dtype=torch.bool)
    with (
        fix.visual_boost(model, tokens=(two, ~two)),
        pytest.raises(ValueError, match="sets are of 2 images with 16 patches"),
    ):
        model(**inputs)
