"""PAROAttention: orders, measures, masks and integers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from golden_files import parts, settings
from regard.core.budgets import relative_error
from regard.ops import softmax_attention
from regard.ops.paro import (
    ParoPlan,
    axis_order_attention,
    axis_orders,
    calibrate_paro,
    choose_order,
    codes_of,
    dequantise_rows,
    forced_blocks,
    int8_scores,
    integer_product,
    keep,
    paro_attention,
    permute_heads,
    quantise_rows,
    sage_attention,
    sage_quantise,
    statistics_of,
    statistics_of_map,
    unpermute_heads,
)
from regard.ops.paro.reference import axis_order_attention_reference

FOLDER = "paro_attention"


def full_plan(codes: list[int], grid: tuple[int, ...], text: int = 0, block: int = 8) -> ParoPlan:
    n = -(-(text + math.prod(grid)) // block)
    masks = torch.ones(1, len(codes), n, n, dtype=torch.bool)
    return ParoPlan(torch.tensor(codes), masks, grid, text, block)


class TestGolden:
    def test_orders(self):
        data = parts(f"{FOLDER}/permutations_a")
        orders = axis_orders((3, 4, 5), 4)
        assert torch.equal(orders, data["out"]["order"].long())
        x, codes = data["in"]["x"], torch.arange(6)
        back = unpermute_heads(x, codes, (3, 4, 5), 4)
        assert torch.equal(back, data["out"]["inverse_permuted"])
        assert torch.equal(permute_heads(back, codes, (3, 4, 5), 4), x)

    @pytest.mark.parametrize(
        ("name", "quant", "room"),
        [("paro_sparse", None, 2e-5), ("paro_sparse_int8", "int8", 2e-4)],
    )
    def test_outputs(self, name: str, quant: str | None, room: float):
        data, config = parts(f"{FOLDER}/{name}"), settings(f"{FOLDER}/{name}")
        given = data["in"]
        grid = config["F"], config["H"], config["W"]
        plan = ParoPlan(
            given["permute_code"].long(), given["block_mask"][None], grid, config["text"],
            config["block"],
        )  # fmt: skip
        out = paro_attention(*(given[n] for n in "qkv"), plan, quant=quant)
        assert (out - data["out"]["o"]).abs().max() < room

    def test_measures(self):
        data, config = parts(f"{FOLDER}/metric_a"), settings(f"{FOLDER}/metric_a")
        grid = config["F"], config["H"], config["W"]
        found = statistics_of_map(data["in"]["attn"], grid, config["block"])
        choice = choose_order(found, config["block"], eps=config["eps"], alpha=config["alpha"])
        for name in ("sparsity", "incoherence", "score"):
            torch.testing.assert_close(
                getattr(choice, name), data["out"][name], atol=1e-5, rtol=1e-6
            )
        assert torch.equal(choice.code, data["out"]["code"].long())

    def test_sage_integers(self):
        data = parts(f"{FOLDER}/sage_int8_a")
        q, k, v = (data["in"][n] for n in "qkv")
        q_int, q_scale, k_int, k_scale, mean = sage_quantise(q, k)
        assert torch.equal(q_int, data["out"]["q_int8"])
        assert torch.equal(k_int, data["out"]["k_int8"])
        torch.testing.assert_close(q_scale, data["out"]["q_scale"], atol=1e-6, rtol=0)
        torch.testing.assert_close(k_scale, data["out"]["k_scale"], atol=1e-6, rtol=0)
        assert torch.equal(mean, data["out"]["k_mean"])
        out = sage_attention(q, k, v)
        assert (out - data["out"]["o"]).abs().max() < 4e-3


class TestAttention:
    @pytest.mark.parametrize("text", [0, 5])
    @pytest.mark.parametrize("grid", [(2, 3, 4), (4, 6), (24,), (2, 2, 2, 3)])
    def test_a_full_plan_is_dense_attention(self, grid: tuple[int, ...], text: int):
        count = len(codes_of(len(grid)))
        codes = [i * 5 % count for i in range(6)]
        q = torch.randn(2, 6, 24 + text, 8, dtype=torch.float64, requires_grad=True)
        k, v = torch.randn(2, 2, 3, 24 + text, 8, dtype=torch.float64)
        out = paro_attention(q, k, v, full_plan(codes, grid, text))
        expected = softmax_attention(q, k, v)
        assert relative_error(out, expected) < 1e-12
        ours, theirs = (torch.autograd.grad(x.square().sum(), q)[0] for x in (out, expected))
        assert relative_error(ours, theirs) < 1e-11

    def test_a_row_with_no_block_is_zero(self):
        plan = full_plan([4], (2, 3, 4))
        plan.masks[:, :, 1] = False
        q, k, v = torch.randn(3, 1, 1, 24, 8)
        for quant in (None, "int8", "int8_pv", "int4"):
            out = paro_attention(q, k, v, plan, quant=quant)
            back = permute_heads(out, plan.codes, plan.grid)
            assert not back[:, :, 8:16].any()
            assert back[:, :, :8].all()
            assert out.isfinite().all()

    def test_refusals(self):
        plan = full_plan([0, 1], (2, 3, 4))
        q, k, v = torch.randn(3, 1, 2, 24, 8)
        for given, options, message in (
            ((q, k, v, full_plan([0, 1], (2, 3, 5))), {}, "plan must be"),
            ((q[:, :1], k[:, :1], v[:, :1], plan), {}, "plan must be for 1 heads"),
            ((q, k, v, plan), {"bucket": 1}, "bucket must be in"),
            ((q, k, v, plan), {"quant": "int2"}, "quant must be one of"),
            ((q.clone().requires_grad_(), k, v, plan), {"quant": "int8"}, "quant must be None"),
        ):
            with pytest.raises(ValueError, match=message):
                paro_attention(*given, **options)
        with pytest.raises(ValueError, match=r"codes must be in \[0, 6\)"):
            full_plan([6], (2, 3, 4))
        with pytest.raises(ValueError, match="masks must be of shape"):
            ParoPlan(torch.tensor([0]), torch.ones(1, 1, 2, 2).bool(), (2, 3, 4), 0, 8)


def along(axis: int, grid: tuple[int, int, int], heads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Heads that are broad along one axis of the grid and local along the other two."""
    generator = torch.Generator().manual_seed(axis)
    axes = torch.meshgrid(*(torch.arange(n) * 1.0 for n in grid), indexing="ij")
    features = []
    for i, place in enumerate(axes):
        if i != axis:  # a circle: the score is the cosine of a distance
            angle = place.flatten() * (2 * math.pi / grid[i])
            features += [angle.cos(), angle.sin()]
    k = torch.stack(features, 1)[None, None] * 6.0
    k = torch.nn.functional.pad(k, (0, 4)).expand(1, heads, -1, -1)
    noise = lambda: torch.randn(k.shape, generator=generator) * 0.05  # noqa: E731
    return k + noise(), k + noise(), torch.randn(k.shape, generator=generator)


def blocks_for(mass: Tensor, share: float) -> int:
    """How many blocks hold a share of the mass."""
    ranked = mass.flatten().sort(descending=True).values.cumsum(0)
    return int((ranked < share * ranked[-1]).sum()) + 1


class TestCalibration:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_the_broad_axis_becomes_the_innermost(self, axis: int):
        grid = (8, 8, 8)
        q, k, _ = along(axis, grid)
        plan = calibrate_paro([(q, k)], grid, block=8, density=0.3)
        assert codes_of(3)[int(plan.codes[0])][-1] == axis
        if axis != 2:
            whole = statistics_of(q, k, grid, 8).whole[0]
            chosen = blocks_for(whole[int(plan.codes[0])], 0.95)
            assert blocks_for(whole[0], 0.95) >= 2 * chosen

    def test_error_at_one_density(self):
        grid = (8, 8, 8)
        q, k, v = along(0, grid, heads=2)
        exact = softmax_attention(q, k, v)
        plans = [
            calibrate_paro([(q, k)], grid, block=8, density=0.3, code=code) for code in (None, 0)
        ]
        assert all(plan.density() == pytest.approx(0.3, abs=0.001) for plan in plans)
        ours, raster = (relative_error(paro_attention(q, k, v, plan), exact) for plan in plans)
        assert ours < 0.05
        assert raster >= 2 * ours

    def test_streamed_measures_are_those_of_the_map(self):
        q, k = torch.randn(2, 1, 2, 5 + 60, 8)
        attention = torch.softmax(q.double() @ k.double().mT * 8**-0.5, 3)[0]
        for text in (0, 5):
            grid = (13, 5) if not text else (3, 4, 5)
            streamed = statistics_of(q, k, grid, 7, text)
            whole = statistics_of_map(attention, grid, 7, text)
            for ours, theirs in zip(streamed, whole, strict=True):
                assert relative_error(ours, theirs) < 1e-5
            order = axis_orders(grid, text)[1]
            mapped = attention[:, order][:, :, order]
            inner = mapped[:, text:, text:][:, : 65 // 7 * 7 if not text else 56]
            inner = inner[:, :, : inner.shape[1]].unflatten(2, (-1, 7)).unflatten(1, (-1, 7))
            assert relative_error(whole.sums[:, 1], inner.sum((2, 4))) < 1e-12
            assert relative_error(whole.peaks[:, 1], inner.amax((2, 4))) < 1e-12

    def test_buckets_and_forced_blocks(self):
        grid, text = (3, 4, 5), 5
        samples = [
            (*torch.randn(2, 1, 2, 65, 8, generator=torch.Generator().manual_seed(i)), i % 3)
            for i in range(6)
        ]
        plan = calibrate_paro(samples, grid, text=text, block=8, density=0.6, buckets=3)
        assert plan.masks.shape == (3, 2, 9, 9)
        forced = forced_blocks(65, 8, text)
        assert plan.masks[:, :, forced].all()
        assert (plan.masks.sum((2, 3)) == round(0.6 * 81)).all()
        assert not torch.equal(plan.masks[0], plan.masks[1])
        assert [plan.bucket(step, 50) for step in (0, 15, 16, 49)] == [0, 0, 1, 2]
        with pytest.raises(ValueError, match="at least one per bucket"):
            calibrate_paro(samples[:1], grid, text=text, block=8, buckets=3)
        with pytest.raises(ValueError, match="at least one pair"):
            calibrate_paro([], grid, block=8)

    def test_keep_takes_the_largest(self):
        mass = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
        assert keep(mass, 0.5).tolist() == [[[True, True], [False, False]]]
        forced = torch.eye(2, dtype=torch.bool)
        assert keep(mass, 0.5, forced).tolist() == [[[True, False], [False, True]]]


class TestIntegers:
    def test_error_of_int8_scores_and_smoothing(self):
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 1, 2, 512, 64, generator=generator)
        plan = full_plan([0, 3], (8, 8, 8), block=64)
        dense = softmax_attention(q, k, v)
        error = relative_error(paro_attention(q, k, v, plan, quant="int8"), dense)
        assert error <= 0.015
        offset = k + 5 * torch.randn(1, 2, 1, 64, generator=generator)
        dense = softmax_attention(q, offset, v)
        plain = relative_error(paro_attention(q, offset, v, plan, quant="int8"), dense)
        smooth = paro_attention(q, offset, v, plan, quant="int8", smooth_k=True)
        assert relative_error(smooth, dense) <= 0.015
        assert plain > 2 * relative_error(smooth, dense)
        unchanged = paro_attention(q, offset, v, plan, smooth_k=True)
        assert relative_error(unchanged, dense) < 1e-5

    def test_weights_and_values_in_integers(self):
        q, k, v = torch.randn(3, 1, 2, 512, 32, generator=torch.Generator().manual_seed(0))
        plan = full_plan([0, 3], (8, 8, 8), block=64)
        dense = softmax_attention(q, k, v)
        errors = [
            relative_error(paro_attention(q, k, v, plan, quant=quant), dense)
            for quant in ("int8", "int8_pv", "int4")
        ]
        assert errors[0] < errors[1] < 0.1
        assert errors[1] < errors[2] < 1.0

    def test_int4_weights_err_less_where_blocks_are_even(self):
        grid = (8, 8, 8)
        incoherence, errors = [], []
        for axis in range(3):
            q, k, _ = along(axis, grid)
            attention = torch.softmax(q @ k.mT * 8**-0.5, 3)[0]
            measured = choose_order(statistics_of_map(attention, grid, 8), 8)
            for code, order in enumerate(axis_orders(grid)):
                blocks = attention[0][order][:, order].unflatten(1, (-1, 8)).unflatten(0, (-1, 8))
                top = blocks.amax((1, 3), keepdim=True)
                rounded = torch.round(15 * blocks / top) * top / 15
                errors.append(float((rounded - blocks).abs().sum()))
                incoherence.append(float(measured.incoherence[0, code]))
            chosen, raster = errors[-6 + int(measured.code[0])], errors[-6]
            assert chosen < raster or axis == 2
        assert torch.corrcoef(torch.tensor([incoherence, errors]))[0, 1] > 0

    @pytest.mark.parametrize("shape", [(40, 30), (1, 1), (300, 5000), (3, 0)])
    def test_products_of_integers_are_exact(self, shape: tuple[int, int], monkeypatch):
        monkeypatch.setattr("regard.ops.paro.quantise._HELD", 1 << 16)
        rows, columns = shape
        q = torch.randint(-127, 128, (2, rows, 64), dtype=torch.int8)
        k = torch.randint(-127, 128, (2, columns, 64), dtype=torch.int8)
        assert torch.equal(integer_product(q, k), q.float() @ k.float().mT)
        assert torch.equal(integer_product(q[0], k[0]), integer_product(q, k)[0])

    def test_int8_scores_are_products_of_what_was_rounded(self):
        q, k = torch.randn(2, 3, 100, 64)
        ours = int8_scores(*quantise_rows(q, 32), *quantise_rows(k, 64))
        rounded = (dequantise_rows(*quantise_rows(x, n), n) for x, n in ((q, 32), (k, 64)))
        first, second = rounded
        assert relative_error(ours, first @ second.mT) < 1e-6

    def test_rounding(self):
        x = torch.tensor([[127.0], [0.5], [-0.5], [1.5], [0.49]])
        integers, scales = quantise_rows(x, 8)
        assert integers.flatten().tolist() == [127, 1, -1, 2, 0]
        assert dequantise_rows(integers, scales, 8)[0, 0] == 127
        zeros, scales = quantise_rows(torch.zeros(5, 2), 2)
        assert not zeros.any()
        assert not dequantise_rows(zeros, scales, 2).any()


class TestPlanFiles:
    def test_round_trip_in_bits(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        masks = torch.rand(10, 3, 33, 33, generator=generator) < 0.3
        plan = ParoPlan(torch.tensor([5, 0, 2]), masks, (8, 8, 4), 4, 8)
        file = tmp_path / "plan.safetensors"
        plan.save(file)
        again = ParoPlan.load(file, grid=(8, 8, 4))
        assert torch.equal(again.masks, masks)
        assert torch.equal(again.codes, plan.codes)
        assert (again.grid, again.text, again.block) == ((8, 8, 4), 4, 8)
        assert file.stat().st_size < masks.numel() / 8 + 600
        with pytest.raises(ValueError, match="was made for the grid"):
            ParoPlan.load(file, grid=(8, 4, 8))

    def test_damaged_and_foreign_files_are_refused(self, tmp_path):
        file = tmp_path / "plan.safetensors"
        full_plan([0], (2, 3, 4)).save(file)
        content = file.read_bytes()
        for cut in (0, 10, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:cut])
            with pytest.raises(ValueError, match="is damaged"):
                ParoPlan.load(file)
        for place in range(8, len(content)):  # one bit of the header or of the tensors
            changed = bytearray(content)
            changed[place] ^= 1
            file.write_bytes(changed)
            with pytest.raises(ValueError, match="is damaged|is not a saved"):
                ParoPlan.load(file)
        from safetensors.torch import save_file

        save_file({"codes": torch.zeros(1), "masks": torch.zeros(1)}, file)
        with pytest.raises(ValueError, match="is not a saved plan"):
            ParoPlan.load(file)


@pytest.mark.slow
def test_streaming_holds_no_map():
    """Calibration at 4096 tokens in 64 blocks keeps a tile of rows, not the map."""
    from ops.samples import Largest

    q = torch.randn(1, 1, 4096, 16)
    with Largest() as largest:
        statistics_of(q, q, (16, 16, 16), 64)
    assert largest.elements <= 64 * 4096


class TestOperands:
    @pytest.mark.parametrize("text", [0, 3])
    @pytest.mark.parametrize("kept_shape", [(1, 1), (2, 6), (2, 1), (1, 6)])
    def test_the_equations_with_every_order(self, text: int, kept_shape: tuple[int, int]):
        grid, block = (3, 2, 4), 5
        n = -(-(text + 24) // block)
        q = torch.randn(2, 6, 24 + text, 4, dtype=torch.float64, requires_grad=True)
        k, v = torch.randn(2, 2, 3, 24 + text, 4, dtype=torch.float64)
        kept = torch.rand(*kept_shape, n, n) < 0.5
        given = {"grid": grid, "text": text, "block": block, "scale": torch.rand(6)}
        out = axis_order_attention(q, k, v, torch.arange(6), kept, **given)
        expected = axis_order_attention_reference(q, k, v, torch.arange(6), kept, **given)
        assert relative_error(out, expected) < 1e-12
        ours, theirs = (torch.autograd.grad(x.square().sum(), q)[0] for x in (out, expected))
        assert relative_error(ours, theirs) < 1e-11

    @pytest.mark.parametrize(("quant", "room"), [("int8", 0.02), ("int8_pv", 0.03), ("int4", 0.4)])
    def test_integers_within_a_mask_of_each_row(self, quant: str, room: float):
        q, k, v = torch.randn(3, 2, 2, 64, 16)
        kept = torch.rand(2, 2, 8, 8) < 0.6
        codes = torch.tensor([2, 5])
        exact = axis_order_attention(q, k, v, codes, kept, grid=(4, 4, 4), block=8)
        out = axis_order_attention(q, k, v, codes, kept, grid=(4, 4, 4), block=8, quant=quant)
        assert 0 < relative_error(out, exact) < room
        alone = axis_order_attention(
            q[1:], k[1:], v[1:], codes, kept[1:], grid=(4, 4, 4), block=8, quant=quant
        )
        assert torch.allclose(alone, out[1:], atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"grid": (2, 3, 5)}, "grid must be"),
            ({"codes": torch.zeros(2)}, "codes must be"),
            ({"codes": torch.zeros(3, dtype=torch.long)}, "codes must be"),
            ({"kept": torch.ones(1, 1, 3, 2, dtype=torch.bool)}, "kept must be"),
            ({"kept": torch.ones(1, 1, 3, 3)}, "kept must be"),
            ({"block": 0}, "block must be"),
            ({"quant": "int2"}, "quant must be"),
            ({"causal": True}, "causal must be False"),
        ],
    )
    def test_refusals(self, change: dict, message: str):
        q, k, v = torch.randn(3, 1, 2, 24, 8)
        given: dict = {
            "codes": torch.tensor([0, 1]), "kept": torch.ones(1, 1, 3, 3, dtype=torch.bool),
            "grid": (2, 3, 4), "block": 8,
        }  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            axis_order_attention(q, k, v, **{**given, **change})

    @pytest.mark.parametrize("code", [-1, 6])
    def test_a_code_that_names_no_order(self, code: int):
        q, k, v = torch.randn(3, 1, 1, 24, 8)
        kept = torch.ones(1, 1, 3, 3, dtype=torch.bool)
        with pytest.raises((IndexError, RuntimeError)):
            axis_order_attention(q, k, v, torch.tensor([code]), kept, grid=(2, 3, 4), block=8)
