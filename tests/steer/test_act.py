"""ACT: the authors' numbers, its laws, and models with padding, groups and caches."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import tiny_models as tiny
from golden_files import GOLDEN, parts
from regard.lens.tap import Attention, tap
from regard.steer import act
from regard.steer.act_heads import LLAMA2_7B_CHAT_CLASSIFICATION
from regard.steer.editing import edit

transformers = tiny.transformers


def described(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def causal(*shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(*shape, generator=made, dtype=torch.float64)
    mask = torch.ones(shape[-2:], dtype=torch.bool).tril(shape[-1] - shape[-2])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def means(weights: torch.Tensor) -> torch.Tensor:
    return weights.sum(-2) / torch.arange(weights.shape[-1], 0, -1)


def test_maps_of_the_authors() -> None:
    name = "act_calibration/calibrate"
    data, told = parts(name), described(name)
    weights, theta = data["in"]["attention"], told["threshold"]
    assert torch.allclose(means(weights)[0], data["out"]["column_mean"], atol=1e-6)
    sinks = act.find_sinks(weights, theta=theta)
    assert torch.equal(sinks[0], data["out"]["sinks_mask"].bool())
    heads = told["heads"]
    new = weights.clone()
    new[:, heads] = act.calibrate_attention(weights[:, heads], told["beta"], theta)
    assert torch.allclose(new, data["out"]["attention"], rtol=0, atol=told["tol"])
    assert torch.allclose(new.sum(-1), torch.ones(()), atol=1e-6)


def test_a_llama_of_the_authors() -> None:
    name = "act_calibration/llama_prefill"
    data, told = parts(name), described(name)
    config = transformers.LlamaConfig(**told["config"], attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(data["state"])
    ids, out, tol = data["in"]["input_ids"], data["out"], told["tol"]
    heads = {int(layer): chosen for layer, chosen in told["heads"].items()}
    with torch.no_grad():
        base = model(ids).logits
        assert torch.allclose(base, out["logits_base"], rtol=0, atol=tol)
        with act.act_calibration(model, heads, beta=told["beta"], theta=told["threshold"]):
            result = model(ids, output_attentions=True)
        assert torch.allclose(result.logits, out["logits_act"], rtol=0, atol=tol)
        for layer, weights in enumerate(result.attentions):
            assert torch.allclose(weights, out[f"attn{layer}"], rtol=0, atol=tol)
        assert torch.equal(model(ids).logits, base)
        model.set_attn_implementation("sdpa")
        with act.act_calibration(model, heads, beta=told["beta"], theta=told["threshold"]):
            assert torch.allclose(model(ids).logits, out["logits_act"], rtol=0, atol=tol)


def test_laws_of_the_edit() -> None:
    weights = causal(2, 3, 33, 33)
    sinks = act.find_sinks(weights, theta=0.06)
    assert sinks.any()
    new = act.calibrate(weights, sinks, 0.4)
    assert torch.allclose(new.sum(-1), weights.sum(-1), atol=1e-12)
    assert torch.allclose(act.calibrate(weights, sinks, 1.0), weights, atol=1e-15)
    assert torch.equal(act.calibrate_attention(weights, theta=1.1), weights)
    assert not act.find_sinks(weights, theta=0.06, spare_first=True).equal(sinks)
    relative = act.find_sinks(weights, alpha=3.0)
    assert torch.equal(relative, means(weights) > 3 / 33)
    gone = act.calibrate(weights, sinks, 0.0)
    where = sinks[:, :, None].expand_as(gone) & (gone != weights)
    assert float(gone[where].abs().max()) == 0


def test_matrix_loop_and_partial_sums_agree() -> None:
    weights = causal(1, 4, 257, 257)
    values = torch.randn(1, 4, 257, 8, dtype=torch.float64)
    sinks = act.find_sinks(weights, theta=0.02, spare_first=True)
    new = act.calibrate(weights, sinks, 0.4)
    for head in range(4):
        columns = [j for j in range(257) if sinks[0, head, j]]
        others = [j for j in range(257) if not sinks[0, head, j]]
        for i in (0, 5, 100, 256):
            row = weights[0, head, i].clone()
            freed, room = 0.6 * row[columns].sum(), row[others].sum()
            row[columns] *= 0.4
            row[others] += freed * row[others] / room
            assert torch.allclose(row, new[0, head, i], atol=1e-12)
        part = act.calibrate_output(
            weights[0, head] @ values[0, head],
            weights[0, head][:, columns],
            values[0, head, columns],
            0.4,
        )
        assert torch.allclose(part, new[0, head] @ values[0, head], atol=1e-10)


@torch.no_grad()
def test_partial_sums_in_a_model_with_grouped_heads() -> None:
    """Sinks only, on top of the model's own output: as the edit of the weights, T = 257.

    In float64, as single rows have 0.2 % of their weight on others than sinks.
    """
    model = tiny.decoder("Llama", "sdpa", max_position_embeddings=300).double()
    ids = torch.randint(1, 70, (2, 257), generator=torch.Generator().manual_seed(0))
    with act.act_calibration(model, {1: [0, 2, 3]}, theta=0.02) as context:
        dense = model(ids).logits
    [sinks] = context.sinks.values()
    assert sinks.any(-1).all()

    def output(out: torch.Tensor, attention: Attention) -> torch.Tensor:
        new = out.clone()
        weights = attention.weights_of(attention.heads)
        for b, row in enumerate(sinks):
            for n, head in enumerate(attention.heads):
                j, key_head = row[n].nonzero().flatten(), head // 2
                values = attention.v[b, key_head, j]
                new[b, n] = act.calibrate_output(out[b, n], weights[b, n][:, j], values, 0.4)
        return new

    with edit(model, output=output, heads={1: [0, 2, 3]}):
        assert torch.allclose(model(ids).logits, dense, atol=1e-9)
    assert not torch.allclose(model(ids).logits, dense, atol=1e-3)


def test_what_the_released_code_does_under_its_name() -> None:
    weights = causal(2, 3, 9, 9)
    new = act.calibrate_attention(weights, theta=0.15, compat="official")
    assert torch.equal(new[1], weights[1])  # the first of a batch only
    assert torch.allclose(new[:1], act.calibrate_attention(weights[:1], theta=0.15), atol=1e-15)
    # One token with a cache: the means are the weights, and the first weight becomes 1.
    row = torch.tensor([0.3, 0.2, 0.1, 0.05, 0.35], dtype=torch.float64).view(1, 1, 1, 5)
    new = act.calibrate_attention(row, theta=0.15, compat="official").flatten()
    freed, room = 0.6 * 0.55, 0.45
    expected = [1.0, 0.08, 0.1 * (1 + freed / room), 0.05 * (1 + freed / room), 0.14]
    assert torch.allclose(new, torch.tensor(expected, dtype=torch.float64), atol=1e-15)
    with pytest.raises(ValueError, match="whole prompt"):
        act.calibrate_attention(causal(1, 1, 2, 5), compat="official")
    for options in ({"alpha": 5.0}, {"spare_first": False}, {"theta": None}):
        with pytest.raises(ValueError, match="compat 'official': needs theta"):
            act.calibrate_attention(weights, compat="official", **options)
    with pytest.raises(ValueError, match="compat 'paper'"):
        act.act_calibration(tiny.decoder(), compat="paper")


@torch.no_grad()
def test_the_released_code_in_a_model() -> None:
    model = tiny.decoder()
    options = {"theta": 0.15, "compat": "official", "layers": [1]}
    reported = []
    with act.act_calibration(model, **options):
        first = model(IDS.expand(2, -1), use_cache=True, output_attentions=True)
        cache = tiny.cached(model, first.past_key_values)
        step = model(torch.tensor([[7], [7]]), output_attentions=True, **cache)
        reported = [first.attentions[1], step.attentions[1]]
    assert torch.equal(reported[1][0, :, 0, 0], torch.ones(4))
    assert bool((reported[1][0].sum(-1) > 1).all())
    assert torch.allclose(reported[1][1].sum(-1), torch.ones(()))
    ours = act.act_calibration(model, theta=0.15, layers=[1])
    with ours:
        alone = model(IDS, output_attentions=True).attentions[1]
    assert torch.allclose(reported[0][:1], alone, atol=1e-6)
    plain = model(IDS, output_attentions=True).attentions[1]
    assert torch.allclose(reported[0][1:], plain, atol=1e-6)


IDS = torch.tensor([[11, 28, 10, 17, 14, 26, 5, 9]])


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_is_its_rows_alone(kind: str, side: str) -> None:
    model = tiny.decoder(kind)
    short = IDS[:, :5]
    pad = (3, 0) if side == "left" else (0, 3)
    both = torch.cat([torch.nn.functional.pad(short, pad), IDS])
    mask = torch.nn.functional.pad(torch.ones(1, 5, dtype=torch.long), pad)
    mask = torch.cat([mask, torch.ones_like(IDS)])
    with act.act_calibration(model, {1: [0, 2], 2: [3]}, theta=0.15) as context:
        batch = model(both, attention_mask=mask).logits
        assert all(sinks.any() for sinks in context.sinks.values())
        alone, whole = model(short).logits, model(IDS).logits
    rows = slice(3, None) if side == "left" else slice(0, 5)
    assert torch.allclose(batch[:1, rows], alone, atol=1e-5)
    assert torch.allclose(batch[1:], whole, atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
@torch.no_grad()
def test_cached_decoding_keeps_the_sinks_of_the_prompt(kind: str) -> None:
    model = tiny.decoder(kind, "sdpa")
    more = torch.tensor([[7, 8, 33]])
    with act.act_calibration(model, theta=0.15) as context:
        first = model(IDS, use_cache=True)
        cache = first.past_key_values
        sinks = {name: found.clone() for name, found in context.sinks.items()}
        steps = [model(more[:, n : n + 1], **tiny.cached(model, cache)).logits for n in range(3)]
        assert all(torch.equal(context.sinks[name], found) for name, found in sinks.items())
    # Without a cache: the same edit by hand, the sinks of the prompt being given.
    padded = {name: torch.nn.functional.pad(found, (0, 3)) for name, found in sinks.items()}

    def post(weights: torch.Tensor, attention: Any) -> torch.Tensor:
        return act.calibrate(weights, padded[f"{attention.name}#{attention.layer}"], 0.4)

    with edit(model, post=post):
        whole = model(torch.cat([IDS, more], 1)).logits
    assert torch.allclose(torch.cat(steps, 1), whole[:, 8:], atol=1e-4)
    with act.act_calibration(model, theta=0.15):
        assert model.generate(IDS, max_new_tokens=5, do_sample=False).shape == (1, 13)
        beams = model.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=2)
        plain = model.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=1, use_cache=True)
    assert beams.shape == plain.shape


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma2"])
@torch.no_grad()
def test_generation_with_and_without_a_cache(kind: str, side: str) -> None:
    model = tiny.decoder(kind)
    ids = IDS if side == "none" else torch.tensor([[0, 0, 0, *IDS[0, :5]], [*IDS[0]]])
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True, "attention_mask": (ids != 0).long()}
    heads = {0: [0, 1], 1: [0, 2], 2: [3]}
    with act.act_calibration(model, heads, theta=0.15):
        cached = model.generate(ids, **options)
    with act.act_calibration(model, heads, theta=0.15, prompt=8):
        whole = model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.logits, whole.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    plain = model.generate(ids, **options)
    assert not torch.allclose(plain.logits[1], cached.logits[1], atol=1e-3)


@torch.no_grad()
def test_strength_zero_and_other_heads_are_bit_identical() -> None:
    model = tiny.decoder("Llama", "sdpa")
    before = model(IDS).logits
    with act.act_calibration(model, beta=1.0):
        assert torch.equal(model(IDS).logits, before)
    kept: list[torch.Tensor] = []
    with tap(model, read=lambda a: kept.append(a.output), layers=0):
        model(IDS)
        with act.act_calibration(model, {0: [1]}, theta=0.1):
            model(IDS)
    assert torch.equal(kept[0][:, [0, 2, 3]], kept[1][:, [0, 2, 3]])
    assert not torch.equal(kept[0][:, 1], kept[1][:, 1])
    with pytest.raises(RuntimeError), act.act_calibration(model):
        raise RuntimeError
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_nothing_above_the_bound_changes_nothing() -> None:
    model = tiny.decoder("Llama", "sdpa")
    before = model(IDS).logits
    with act.act_calibration(model, theta=1.1):
        assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_nested_and_two_models_at_once() -> None:
    one, two = tiny.decoder("Llama"), tiny.decoder("Qwen2")
    plain = one(IDS).logits, two(IDS).logits
    first, second, both = (
        act.act_calibration(one, {1: heads}, theta=0.15) for heads in ([0], [2], [0, 2])
    )
    with both:
        joint = one(IDS).logits
    with first, second, act.act_calibration(two, theta=0.15):
        assert torch.equal(one(IDS).logits, joint)
        assert not torch.equal(two(IDS).logits, plain[1])
    with second:  # again
        assert not torch.equal(one(IDS).logits, joint)
    assert torch.equal(one(IDS).logits, plain[0])
    assert torch.equal(two(IDS).logits, plain[1])


@torch.no_grad()
def test_a_cross_model_counts_all_queries() -> None:
    """Where all is seen, the mean is over all queries; decoders of two towers are told apart."""
    model = tiny.bert()
    ids = IDS + 0
    seen: list[torch.Tensor] = []
    with tap(model, read=lambda a: seen.append(a.weights), layers=[0]):
        model(ids)
    with act.act_calibration(model, layers=[0], theta=0.12, spare_first=False) as context:
        model(ids)
    [sinks] = context.sinks.values()
    assert torch.equal(sinks, seen[0].mean(-2) > 0.12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny.decoder("Llama", "eager").to(dtype)
    with act.act_calibration(model, theta=0.15) as context:
        result = model(IDS, output_attentions=True)
    assert any(sinks.any() for sinks in context.sinks.values())
    assert result.logits.dtype == dtype
    assert torch.allclose(result.attentions[1].float().sum(-1), torch.ones(()), atol=2e-2)


def test_slopes_of_all_heads_at_once() -> None:
    model = tiny.decoder().double()

    def loss(model: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(IDS).logits[:, -1], torch.tensor([3]))

    slopes = act.head_slopes(model, loss, layers=[1, 2], theta=0.15)
    assert set(slopes) == {(layer, head) for layer in (1, 2) for head in range(4)}
    base, step = loss(model).item(), 1e-3  # (the model's softmax is in float32)
    for (layer, head), slope in slopes.items():
        with (
            torch.no_grad(),
            act.act_calibration(model, {layer: [head]}, beta=1 - step, theta=0.15),
        ):
            change = (base - loss(model).item()) / step
        assert slope == pytest.approx(change, rel=0.02, abs=1e-4)
    assert max(abs(slope) for slope in slopes.values()) > 1e-3


def planted() -> Any:
    """One layer, two heads: head 1 stares at token 3, which says nothing; the answer is at 2."""
    from regard.mixers import Attention

    layer = Attention(4, 2, causal=True)
    with torch.no_grad():
        for part in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            part.weight.zero_()
        # Channel 0 marks every token, 1 the useless one, 2 the answer.
        layer.q_proj.weight[2, 0] = 1.0
        layer.k_proj.weight[2, 1] = 4.0 * 2**0.5
        layer.v_proj.weight[2, 2] = 1.0
        layer.o_proj.weight[2, 2] = 1.0
    return layer


@torch.no_grad()
def test_a_planted_sink() -> None:
    layer = planted()
    x = torch.zeros(1, 12, 4)
    x[..., 0], x[:, 3, 1], x[:, 5, 2] = 1, 1, 1

    def answer(model: torch.nn.Module) -> float:
        return float(model(x)[0, -1, 2])

    rises = []
    for beta in (1.0, 0.7, 0.4, 0.1, 0.0):
        with act.act_calibration(layer, {0: [1]}, beta=beta, spare_first=False, theta=0.35):
            rises.append(answer(layer))
    assert rises == sorted(rises)
    assert rises[-1] > 3 * rises[0]
    found = act.search_heads(layer, answer, theta=0.35, spare_first=False)
    assert found.heads == {0: [1]}
    assert set(found.scores) == {(0, 0), (0, 1)}


def test_bad_requests() -> None:
    model = tiny.decoder()
    with pytest.raises(ValueError, match=r"beta 1\.5"):
        act.act_calibration(model, beta=1.5)
    with pytest.raises(ValueError, match="prompt 0"):
        act.act_calibration(model, prompt=0)
    with pytest.raises(ValueError, match=r"layers .* the model has layers 0 to 2"):
        act.act_calibration(model, LLAMA2_7B_CHAT_CLASSIFICATION)
    with pytest.raises(ValueError, match="theta, alpha"):
        act.find_sinks(causal(1, 3, 3), theta=None)
    with pytest.raises(ValueError, match=r"heads \[4\].*heads 0 to 3"):
        act.act_calibration(model, {1: [4]})
    for search in (act.search_heads, act.head_slopes):
        with pytest.raises(ValueError, match=r"layers \[5\]: the model has \[0, 1, 2\]"):
            search(model, lambda m: 0.0, layers=[5])
        with pytest.raises(ValueError, match="several towers have a layer 0"):
            search(tiny.whisper(), lambda m: 0.0)
    with torch.no_grad():
        cache = model(IDS).past_key_values
        with act.act_calibration(model), pytest.raises(ValueError, match="inside the context"):
            model(IDS[:, :1], **tiny.cached(model, cache))
