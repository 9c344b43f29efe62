"""Pyramid sparse attention: the released code's importance, levels, orders and outputs."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch
from torch import Tensor

from golden_files import GOLDEN, parts, settings
from ops.samples import megabytes_over_inputs, tensors
from regard.core.budgets import relative_error
from regard.ops import pyramid_attention, pyramid_levels, softmax_attention
from regard.ops.block_sparse import BlockPlan
from regard.ops.pyramid_sparse import assignment
from regard.ops.pyramid_sparse.importance import antidiagonal_importance, sampled_importance
from regard.ops.pyramid_sparse.order import (
    gilbert_order,
    inverse,
    semantic_order,
    tile_order,
    with_text,
)
from regard.ops.pyramid_sparse.presets import PRESETS
from regard.ops.pyramid_sparse.reference import pyramid_attention_reference
from regard.ops.pyramid_sparse.similarity import similarity_caps

FOLDER = "pyramid_sparse_attention"
CASES = json.loads((GOLDEN / FOLDER / "mask_a.json").read_text())["cases"]


class TestReleasedCode:
    def test_sampled_importance(self):
        data = parts(f"{FOLDER}/importance_a")
        q, k = data["in"]["q"].float(), data["in"]["k"].float()
        offsets = data["in"]["q_sample"].long(), data["in"]["k_sample"].long()
        found = sampled_importance(q, k, *offsets, block_q=128, block_k=128, scale=32**-0.5)
        torch.testing.assert_close(found, data["out"]["importance"], atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case["mode"])
    def test_levels(self, case):
        data = parts(f"{FOLDER}/mask_a")
        mass, n = data["in"]["importance"], case["index"]
        threshold = case["mode"].startswith("thresholdbound")
        q, k = mass.new_zeros(1, 2, 12 * 128, 4), mass.new_zeros(1, 2, 40 * case["block_n"], 4)
        levels = pyramid_levels(
            q, k, importance=mass, mode="thresholdbound" if threshold else "topk",
            ratios={int(level): tuple(ends) for level, ends in case["mask_ratios"].items()},
            block_k=case["block_n"], tile=case["tile_n"], compat="official",
            protected_blocks=-(-case["text_length"] // case["block_n"]),
        )  # fmt: skip
        assert torch.equal(levels.int(), data["out"][f"level_{n}"])
        density = BlockPlan(levels, 12 * 128, k.shape[2], 128, case["block_n"])
        assert density.density() == pytest.approx(case["official_density"], abs=1e-6)
        if case["mode"].endswith("newtype"):
            lists = data["out"][f"raw_{n}"]
            assert torch.equal(assignment.decode_levels(lists), levels)
            assert torch.equal(assignment.encode_levels(levels, mass), lists)

    def test_causal_levels(self):
        data, config = parts(f"{FOLDER}/vlm_levels_a"), settings(f"{FOLDER}/vlm_levels_a")
        q, k = data["in"]["q"].float(), data["in"]["k"].float()
        found = antidiagonal_importance(
            q, k, block_q=128, block_k=128, stride=config["stride"], scale=32**-0.5, causal=True
        )
        torch.testing.assert_close(found, data["out"]["importance"], atol=1e-4, rtol=1e-4)
        options = {
            "ratios": {int(level): tuple(end) for level, end in config["mask_ratios"].items()},
            "mode": "energybound", "importance": "antidiagonal", "causal": True,
            "compat": "official",
        }  # fmt: skip
        before = pyramid_levels(q, k, **options)
        assert torch.equal(before.int(), data["out"]["mask_before_similarity"])
        thresholds = tuple(config["sim_thresholds"])
        assert torch.equal(similarity_caps(k, 128, thresholds).int(), data["out"]["k_similarity"])
        after = pyramid_levels(q, k, similarity_caps=thresholds, **options)
        assert torch.equal(after.int(), data["out"]["level"])

    @pytest.mark.parametrize("name", ["attn_new_n128", "attn_old_causal"])
    @pytest.mark.parametrize("impl", ["eager", "reference"])
    def test_outputs_and_gradients(self, name: str, impl: str):
        data, config = parts(f"{FOLDER}/{name}"), settings(f"{FOLDER}/{name}")
        inputs = [data["in"][n].float().requires_grad_() for n in "qkv"]
        options = {"block_q": config["block_m"], "block_k": config["block_n"],
                   "causal": config["causal"]}  # fmt: skip
        if impl == "reference":
            out = pyramid_attention_reference(*inputs, data["in"]["level"], **options)
        else:
            out = pyramid_attention(*inputs, data["in"]["level"], impl=impl, **options)
        torch.testing.assert_close(out, data["out"]["o"], atol=2e-5, rtol=1e-4)
        if "grad" in data:
            found = torch.autograd.grad(out, inputs, data["in"]["grad_out"].float())
            for name, gradient in zip("qkv", found, strict=True):
                torch.testing.assert_close(gradient, data["grad"][name], atol=1e-4, rtol=1e-3)

    def test_gilbert_orders(self):
        for name, order in parts(f"{FOLDER}/gilbert_a")["out"].items():
            width, height, depth = map(int, name.removeprefix("order_").split("x"))
            assert torch.equal(gilbert_order((depth, height, width)), order.long())


def random_levels(rows: int, columns: int, *, least: int = 0, heads: int = 2) -> Tensor:
    values = torch.tensor([0, 1, 2, 4, 8])[least:]
    generator = torch.Generator().manual_seed(rows)
    return values[torch.randint(len(values), (1, heads, rows, columns), generator=generator)]


class TestAttention:
    @pytest.mark.parametrize("tail", ["exact", "replicate"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_two_independent_definitions(self, causal: bool, tail: str):
        inputs = [x.requires_grad_() for x in tensors(T=70, S=93)]
        mask = torch.rand(2, 93, generator=torch.Generator().manual_seed(0)) > 0.2
        options = {
            "block_q": 16, "block_k": 16, "causal": causal, "tail": tail, "key_mask": mask,
            "key_bias": torch.randn(2, 4, 93, dtype=torch.float64),
        }  # fmt: skip
        levels = random_levels(5, 6)
        found = pyramid_attention(*inputs, levels, **options)
        expected = pyramid_attention_reference(*inputs, levels, **options)
        assert relative_error(found, expected) < 1e-12
        weight = torch.randn_like(found)
        for ours, theirs in zip(
            torch.autograd.grad(found, inputs, weight),
            torch.autograd.grad(expected, inputs, weight), strict=True,
        ):  # fmt: skip
            assert relative_error(ours, theirs) < 1e-10

    @pytest.mark.parametrize("causal", [False, True])
    def test_ones_are_dense_attention(self, causal: bool):
        q, k, v = tensors(T=300, S=300, D=16, Dv=16, dtype=torch.float32)
        out = pyramid_attention(q, k, v, torch.ones(1, 1, 3, 3).long(), causal=causal)
        assert relative_error(out, softmax_attention(q, k, v, causal=causal)) < 1e-5

    def test_constant_groups_are_dense_attention(self):
        q, k, v = tensors(T=96, S=96, dtype=torch.float32)
        k, v = (x[:, :, ::8].repeat_interleave(8, 2) for x in (k, v))
        levels = random_levels(6, 6, least=1)
        out = pyramid_attention(q, k, v, levels, block_q=16, block_k=16)
        assert relative_error(out, softmax_attention(q, k, v)) < 1e-5

    def test_gradcheck_with_a_padded_tail(self):
        inputs = [x.requires_grad_() for x in tensors(B=1, H=1, Hk=1, T=19, S=19, D=2, Dv=1)]
        levels = torch.tensor([[[[1, 4], [2, 8]]]])
        for causal in (False, True):

            def op(*given: Tensor, causal: bool = causal) -> Tensor:
                return pyramid_attention(*given, levels, block_q=16, block_k=16, causal=causal)

            assert torch.autograd.gradcheck(op, inputs)

    def test_the_future_changes_nothing(self):
        q, k, v = tensors(T=64, S=64, dtype=torch.float32)
        levels = random_levels(8, 8)
        levels[..., range(8), range(8)] = 1
        options = {"block_q": 8, "block_k": 8, "causal": True}
        before = pyramid_attention(q, k, v, levels, **options)
        for t in (5, 23, 40):
            later = [x.clone() for x in (q, k, v)]
            for x in later:
                x[:, :, t + 1 :] = 1e4
            after = pyramid_attention(*later, levels, **options)
            assert torch.equal(after[:, :, : t + 1], before[:, :, : t + 1])

    def test_errors_name_the_op(self):
        q, k, v = tensors(T=8, S=8)
        with pytest.raises(ValueError, match="pyramid_attention: levels must be of shape"):
            pyramid_attention(q, k, v, torch.ones(1, 1, 3, 1).long())
        with pytest.raises(ValueError, match="pyramid_attention: tail must be one of"):
            pyramid_attention(q, k, v, torch.ones(1, 1, 1, 1).long(), tail="exakt")


class TestLevels:
    def test_few_blocks_keep_their_best(self):
        mass = torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
        q, k = torch.zeros(1, 2, 24, 4), torch.zeros(1, 2, 40, 4)
        options = {"ratios": PRESETS["plug-in"].ratios, "importance": mass,
                   "block_q": 8, "block_k": 8}  # fmt: skip
        ours = pyramid_levels(q, k, **options)
        assert (ours.gather(3, mass.argmax(3, keepdim=True)) == 1).all()
        assert not (pyramid_levels(q, k, compat="official", **options) == 1).any()

    def test_a_dominant_block_is_never_coarse(self):
        mass = torch.tensor([0.95, 0.03, 0.02, 0.0]).expand(1, 1, 1, 4)
        ratios = {1: 0.7, 2: 0.8, 4: 0.9, 8: 0.96, 0: 1.0}
        q, k = torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 32, 4)
        options = {"ratios": ratios, "mode": "energybound", "importance": mass,
                   "block_q": 8, "block_k": 8}  # fmt: skip
        assert pyramid_levels(q, k, **options)[0, 0, 0, 0] == 1
        assert pyramid_levels(q, k, compat="official", **options)[0, 0, 0, 0] == 8

    @pytest.mark.parametrize("importance", ["sampled", "antidiagonal", "means"])
    @pytest.mark.parametrize(("T", "S"), [(100, 100), (30, 100), (100, 30)])
    def test_causal_levels_skip_the_future_and_keep_the_diagonal(self, T, S, importance):
        q, k, v = tensors(T=T, S=S, D=8, Dv=8, dtype=torch.float32)
        levels = pyramid_levels(
            q, k, ratios={1: 0.2, 2: 0.4, 0: 1.0}, causal=True, block_q=16, block_k=16,
            importance=importance,
        )  # fmt: skip
        position = torch.arange(T) + S - T
        own = position.clamp(min=0) // 16
        assert (levels[:, :, torch.arange(T) // 16, own] == 1).all()
        last = [int(position[min(T, (i + 1) * 16) - 1]) for i in range(levels.shape[2])]
        for i, position_of_last in enumerate(last):
            assert not levels[:, :, i, max(1, position_of_last // 16 + 1) :].any()
        out = pyramid_attention(q, k, v, levels, block_q=16, block_k=16, causal=True)
        assert out.isfinite().all()

    @pytest.mark.parametrize("importance", ["sampled", "antidiagonal", "means"])
    def test_all_estimates_find_the_block_that_matters(self, importance: str):
        generator = torch.Generator().manual_seed(1)
        centres = torch.randn(1, 4, 8, 16, generator=generator)
        tokens = centres.repeat_interleave(16, 2) * 4
        q = tokens + torch.randn(1, 4, 128, 16, generator=generator) * 0.1
        k = tokens[:, ::2].flip(2)  # block i matters to block 7 - i; grouped queries
        q = q[:, ::2].repeat_interleave(2, 1)
        levels = pyramid_levels(
            q, k, ratios={1: 0.13, 0: 1.0}, block_q=16, block_k=16, importance=importance
        )
        assert torch.equal(levels.argmax(3), torch.arange(7, -1, -1).expand(1, 4, 8))

    def test_seeds(self):
        q, k, _ = tensors(T=256, S=256, dtype=torch.float32)
        draw = lambda seed: pyramid_levels(  # noqa: E731
            q, k, ratios={1: 0.3, 4: 0.6, 0: 1.0}, block_q=16, block_k=16,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
        )  # fmt: skip
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))
        assert torch.equal(draw(None), draw(None))

    def test_refusals(self):
        q, k, _ = tensors(T=64, S=64)
        for options, message in (
            ({"ratios": {1: 0.5, 2: 0.2}}, "ratios must be"),
            ({"ratios": {3: 0.5}}, "ratios must be"),
            ({"ratios": {1: 0.5}, "mode": "thresholdbound", "causal": True}, "mode must be"),
            ({"ratios": {8: 0.5}, "block_k": 12}, "levels that divide"),
            ({"ratios": {1: 0.5}, "importance": torch.ones(1)}, "importance must be of shape"),
            ({"ratios": {1: 0.5}, "importance": "antidiagonal", "stride": 7}, "stride must be"),
            ({"ratios": {1: 0.5}, "compat": "offical"}, "compat must be one of"),
        ):
            with pytest.raises(ValueError, match=message):
                pyramid_levels(q, k, **options)

    def test_damaged_lists_are_refused(self):
        lists = parts(f"{FOLDER}/mask_a")["out"]["raw_1"].clone()
        lists[..., 0] = lists[..., 1]
        with pytest.raises(ValueError, match="decode_levels"):
            assignment.decode_levels(lists)
        with pytest.raises(ValueError, match="decode_levels"):
            assignment.decode_levels(lists.clamp(min=0))


class TestOrders:
    @pytest.mark.parametrize("grid", [(1, 1, 1), (7,), (5, 3), (2, 4, 6), (3, 7, 2), (4, 8, 2)])
    def test_gilbert_visits_every_cell(self, grid: tuple[int, ...]):
        order = gilbert_order(grid)
        assert torch.equal(order.sort().values, torch.arange(len(order)))
        assert torch.equal(order[inverse(order)], torch.arange(len(order)))
        if all(n % 2 == 0 for n in grid):
            cells = torch.stack(torch.unravel_index(order, grid), 1)
            assert ((cells[1:] - cells[:-1]).abs().sum(1) == 1).all()

    @pytest.mark.parametrize("behind", [False, True])
    def test_round_trips(self, behind: bool):
        x = torch.randn(2, 3, 5 + 24, 4)
        for order in (gilbert_order((2, 3, 4)), tile_order((2, 3, 4), (1, 3, 2))):
            order = with_text(order, 5, behind=behind)
            moved = x[:, :, order]
            text = moved[:, :, -5:] if behind else moved[:, :, :5]
            assert torch.equal(text, x[:, :, :5])
            assert torch.equal(moved[:, :, inverse(order)], x)

    def test_clusters_are_found(self):
        generator = torch.Generator().manual_seed(0)
        own = torch.randint(4, (1, 2, 200), generator=generator)
        centres = torch.eye(4) * 5
        x = centres[own] + torch.randn(1, 2, 200, 4, generator=generator) * 0.1
        order, found = semantic_order(x, 4, steps=20, centres=centres.expand(1, 2, 4, 4))
        assert (own.gather(2, order).diff(dim=2) != 0).sum(2).tolist() == [[3, 3]]
        assert relative_error(found, centres.expand_as(found)) < 0.05
        again, _ = semantic_order(x, 4, steps=0, centres=found)
        assert torch.equal(again, order)

    def test_a_tile_that_does_not_fit(self):
        with pytest.raises(ValueError, match="tile must divide the grid"):
            tile_order((2, 3), (2, 2))


def video(grid: tuple[int, int, int], heads: int, D: int, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v in Gilbert order: keys and values smooth along the grid, peaked queries."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.linspace(0, 1, n) for n in grid), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, 2)[gilbert_order(grid)]
    waves = torch.randn(heads, 3, D, generator=generator) * 4
    phases = torch.rand(heads, 1, D, generator=generator) * 6.3
    k = torch.sin(place @ waves + phases)[None] * 2.0
    v = torch.cos(place @ torch.randn(heads, 3, D, generator=generator) * 4)[None]
    noise = lambda: torch.randn(k.shape, generator=generator)  # noqa: E731
    return k + 0.3 * noise(), k + 0.1 * noise(), v + 0.1 * noise()


def test_a_pyramid_beats_a_binary_mask_and_improves_with_density():
    q, k, v = video((8, 16, 16), 2, 32)
    exact = softmax_attention(q, k, v)
    blocks = {"block_q": 64, "block_k": 64}

    def error(ratios: dict[int, float]) -> tuple[float, float]:
        levels = pyramid_levels(q, k, ratios={**ratios, 0: 1.0}, **blocks)
        density = BlockPlan(levels, 2048, 2048, 64, 64).density()
        return relative_error(pyramid_attention(q, k, v, levels, **blocks), exact), density

    pyramid, work = error({1: 0.065, 2: 0.1, 4: 0.19, 8: 0.55})
    binary, work_of_binary = error({1: 0.16})
    assert work <= work_of_binary == pytest.approx(0.15, abs=0.01)
    assert binary > 1.3 * pyramid
    errors = [error({1: d * 0.5, 4: d * 1.5, 8: min(1.0, d * 3.5)})[0] for d in (0.1, 0.2, 0.4)]
    assert all(a > b for a, b in itertools.pairwise(errors)), errors


@pytest.mark.slow
def test_memory_at_16384_tokens():
    """Of the whole pipeline, over q, k and v."""
    options = (
        "levels=__import__('regard').ops.pyramid_levels(*given[:2], "
        "ratios={1: 0.1, 2: 0.15, 8: 0.35, 0: 1.0})"
    )
    used = megabytes_over_inputs("regard.ops:pyramid_attention", 16384, options=options)
    assert used < 64, used


@pytest.mark.slow
def test_faster_than_dense_at_16384_tokens():
    """One thread, CPU time of this process; the least of three alternated calls."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 16384, 64, generator=generator)
    ratios = {1: 0.1, 2: 0.15, 8: 0.35, 0: 1.0}
    calls = {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "levels": lambda: pyramid_levels(q, k, ratios=ratios),
        "attend": lambda: pyramid_attention(q, k, v, levels),
    }
    levels = pyramid_levels(q, k, ratios=ratios)
    assert BlockPlan(levels, 16384, 16384).density() < 0.15
    seconds = dict.fromkeys(calls, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            for name, call in calls.items():
                start = time.process_time()
                call()
                seconds[name] = min(seconds[name], time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert seconds["dense"] >= 4 * seconds["attend"], seconds
    assert seconds["dense"] >= 3.3 * (seconds["attend"] + seconds["levels"]), seconds
