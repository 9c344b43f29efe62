"""Tiles of mask and bias against a construction of the whole T x S, one pair after the other."""

from __future__ import annotations

import math
import random

import pytest
import torch

from regard.core.decay import decay_sums
from regard.core.visibility import Visibility

INF = math.inf
B, H = 2, 4


def seen_and_bias(T, S, position, causal, window, key_mask, key_bias, log_decay, bias):
    """The definition. `position(i)` is where query i stands; operands of H heads, or None."""
    mask = torch.zeros(B, H, T, S, dtype=torch.bool)
    total = torch.zeros(B, H, T, S, dtype=torch.float64)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, (B, H, T, S))).tolist():
        at = position(i)
        seen = not (causal and j > at)
        if window is not None:
            left, right = window
            seen &= (left < 0 or j >= at - left) and (right < 0 or j <= at + right)
        real = [True] * S if key_mask is None else key_mask[b].tolist()
        value = 0.0
        if log_decay is not None:
            last = min(max(at, 0), S - 1) if causal else S - 1
            steps = [float(log_decay[b, h, m]) for m in range(j + 1, last + 1) if real[m]]
            seen &= -INF not in steps
            value += sum(steps)
        if key_bias is not None:
            value += float(key_bias[b, h, j])
        if bias is not None:
            value += float(bias[b, h, i, j])
        mask[b, h, i, j] = seen and real[j]
        total[b, h, i, j] = value
    return mask, total


def widen(operand, heads=H):
    """Key heads repeated to query heads."""
    return None if operand is None else operand.repeat_interleave(heads // operand.shape[1], 1)


def tiles(visibility, T, S, rows, columns, dtype=torch.float64):
    """Mask and bias assembled from tiles of the given size."""
    mask = torch.zeros(B, H, T, S, dtype=torch.bool)
    bias = torch.zeros(B, H, T, S, dtype=dtype)
    for i in range(0, T, rows):
        for j in range(0, S, columns):
            at = (slice(None), slice(None), slice(i, i + rows), slice(j, j + columns))
            tile = visibility.tile((i, min(i + rows, T)), (j, min(j + columns, S)), dtype)
            mask[at] = True if tile.mask is None else tile.mask
            bias[at] = 0.0 if tile.bias is None else tile.bias
            assert tile.mask is None or tile.mask.dim() == 4
            assert tile.bias is None or tile.bias.dtype == dtype
    return mask, bias


def draw(seed):
    """A random call: sizes, masks and operands, each there or not."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    T, S = chance.choice([(5, 5), (3, 7), (7, 3), (1, 6), (6, 1), (4, 4)])
    operands = {"key_mask": None, "key_bias": None, "log_decay": None, "bias": None}
    if chance.random() < 0.5:
        operands["key_mask"] = torch.rand(B, S, generator=generator) < 0.7
    if chance.random() < 0.5:
        shape = (B, chance.choice([1, 2, H]), S)
        operands["key_bias"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    if chance.random() < 0.6:
        shape = (B, chance.choice([1, 2, H]), S)
        steps = -torch.rand(shape, generator=generator, dtype=torch.float64)
        forget = torch.rand(shape, generator=generator) < 0.15
        operands["log_decay"] = torch.where(forget, -INF, steps)
    if chance.random() < 0.5:
        shape = [size if chance.random() < 0.7 else 1 for size in (B, H, T, S)]
        shape = shape[chance.choice([0, 0, 1, 2, 3, 4]) :]
        operands["bias"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    causal = chance.random() < 0.6
    window = chance.choice([None, None, (-1, -1), (2, 0), (0, 0), (1, 2), (-1, 1), (3, -1)])
    return T, S, causal, window, operands, chance


@pytest.mark.parametrize("seed", range(60))
def test_tiles_equal_the_definition(seed):
    T, S, causal, window, given, chance = draw(seed)
    first_query = chance.choice([None, None, None, 0, 2])
    offset = S - T if first_query is None else first_query
    log_decay, key_mask = given["log_decay"], given["key_mask"]
    decay = None if log_decay is None else decay_sums(log_decay, key_mask)
    visibility = Visibility(
        T, S, causal, window, key_mask, given["key_bias"], decay, given["bias"], heads=H,
        first_query=first_query,
    )  # fmt: skip
    assert visibility.offset == offset
    dense = None if given["bias"] is None else given["bias"].expand(B, H, T, S)
    mask, bias = seen_and_bias(
        T, S, lambda i: i + offset, causal, window, key_mask, widen(given["key_bias"]),
        widen(log_decay), dense,
    )  # fmt: skip
    rows, columns = chance.choice([(1, 1), (2, 3), (3, 2), (16, 16)])
    found_mask, found_bias = tiles(visibility, T, S, rows, columns)
    assert torch.equal(found_mask, mask)
    torch.testing.assert_close(found_bias[mask], bias[mask], rtol=0, atol=1e-12)
    assert found_bias.isfinite().all()
    if visibility.trivial:
        assert mask.all()
        assert not bias.any()


@pytest.mark.parametrize("seed", range(40))
def test_key_range_holds_all_visible_keys_and_is_tight_by_position(seed):
    T, S, causal, window, _, _ = draw(seed)
    visibility = Visibility(T, S, causal, window, heads=H)
    mask, _ = tiles(visibility, T, S, 16, 16)
    for start in range(T):
        for stop in range(start + 1, T + 1):
            low, high = visibility.key_range(start, stop)
            assert 0 <= low <= high <= S
            columns = mask[0, 0, start:stop].any(0).nonzero().flatten().tolist()
            assert (low, high) == (columns[0], columns[-1] + 1) if columns else low == high


def test_nothing_to_hide_is_none_and_trivial():
    assert Visibility(3, 5).tile((0, 3), (0, 5), torch.float32) == (None, None)
    assert Visibility(3, 5).trivial
    assert Visibility(3, 5, window=(7, 7)).trivial
    assert not Visibility(3, 5, causal=True).trivial
    assert not Visibility(3, 5, key_mask=torch.ones(1, 5, dtype=torch.bool)).trivial


def test_one_query_that_continues_a_cache_sees_everything():
    decoding = Visibility(1, 9, causal=True)
    assert decoding.trivial
    assert decoding.tile((0, 1), (0, 9), torch.float32) == (None, None)


def test_an_interior_tile_has_no_mask():
    causal = Visibility(64, 64, causal=True)
    assert causal.tile((32, 48), (0, 32), torch.float32).mask is None
    assert causal.tile((32, 48), (0, 33), torch.float32).mask is None
    assert causal.tile((32, 48), (0, 34), torch.float32).mask is not None
    banded = Visibility(64, 64, causal=True, window=(20, 0))
    assert banded.tile((32, 48), (27, 33), torch.float32).mask is None
    assert banded.tile((32, 48), (26, 33), torch.float32).mask is not None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(0, 0), (0, 4), (4, 0)])
def test_empty_sizes_give_empty_tiles(causal, T, S):
    key_mask = torch.ones(B, S, dtype=torch.bool)
    decay = decay_sums(torch.zeros(B, 2, S))
    bias = torch.zeros(B, H, T, S)
    key_bias = torch.zeros(B, 2, S)
    visibility = Visibility(T, S, causal, None, key_mask, key_bias, decay, bias, heads=H)
    assert visibility.key_range(0, T) == (0, S)
    tile = visibility.tile((0, T), (0, S), torch.float32)
    assert torch.broadcast_to(tile.mask, (B, H, T, S)).shape == (B, H, T, S)
    assert torch.broadcast_to(tile.bias, (B, H, T, S)).shape == (B, H, T, S)


def test_a_hidden_pair_never_carries_an_infinite_bias():
    """Not even where the difference overflows the dtype: masking would turn inf into NaN."""
    log_decay = torch.full((1, 1, 6), -5e8, dtype=torch.float64)
    log_decay[:, :, 3] = -INF
    for dtype in (torch.float32, torch.float16):
        tile = Visibility(6, 6, True, decay=decay_sums(log_decay)).tile((0, 6), (0, 6), dtype)
        assert not tile.bias[tile.mask.logical_not()].any()


def test_gradient_of_decay_survives_sums_that_rise_by_rounding():
    """A parallel scan may round a sum above its predecessor: the pair is visible all the same."""
    sums = decay_sums(torch.zeros(1, 1, 3, dtype=torch.float64))
    raised = sums._replace(sums=torch.tensor([[[-1.0, -1.0 + 1e-15, -1.0]]], dtype=torch.float64))
    raised.sums.requires_grad_()
    tile = Visibility(3, 3, True, decay=raised).tile((1, 2), (0, 1), torch.float64)
    (gradient,) = torch.autograd.grad(tile.bias.sum(), raised.sums)
    assert gradient.tolist() == [[[-1.0, 1.0, 0.0]]]


def test_gradients_of_every_bias():
    log_decay = -torch.rand(B, 2, 5, generator=torch.Generator().manual_seed(1)).double()
    log_decay[0, 0, 2] = -INF
    key_bias, bias = torch.zeros(B, 1, 5).double(), torch.zeros(4, 1, 5).double()
    finite = log_decay.isfinite()
    values = log_decay[finite].clone()

    def total(values, key_bias, bias):
        decay = decay_sums(log_decay.masked_scatter(finite, values))
        visibility = Visibility(3, 5, True, None, None, key_bias, decay, bias, heads=H)
        tile = visibility.tile((0, 3), (0, 5), torch.float64)
        return torch.where(tile.mask, tile.bias, 0.0).sin()

    inputs = [t.requires_grad_() for t in (values, key_bias, bias)]
    assert torch.autograd.gradcheck(total, inputs)


def test_operands_whose_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="heads must be a multiple of an operand's 2 heads, got 1"):
        Visibility(3, 5, key_bias=torch.zeros(1, 2, 5))


def test_tiles_on_the_meta_device():
    decay = decay_sums(torch.zeros(B, H, 5, device="meta"))
    visibility = Visibility(5, 5, True, (2, 0), decay=decay, heads=H, device="meta")
    tile = visibility.tile((0, 4), (0, 5), torch.float32)
    assert tile.bias.shape == tile.mask.shape == (B, H, 4, 5)


def test_tiles_under_compile_with_changing_lengths():
    def total(log_decay, T):
        S = log_decay.shape[2]
        visibility = Visibility(T, S, True, (4, 0), decay=decay_sums(log_decay), heads=1)
        if visibility.trivial:
            return log_decay.sum()
        tile = visibility.tile((0, T), visibility.key_range(0, T), torch.float64)
        return torch.where(tile.mask, tile.bias, 0.0).sum()

    compiled = torch.compile(total, fullgraph=True, backend="eager", dynamic=True)
    for S in (8, 9, 12):
        log_decay = -torch.rand(1, 1, S, generator=torch.Generator().manual_seed(S)).double()
        assert torch.equal(compiled(log_decay, S - 2), total(log_decay, S - 2))
