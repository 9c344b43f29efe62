"""Decay sums against a plain loop, and at the places where sums usually break."""

from __future__ import annotations

import math

import pytest
import torch

from regard.core.decay import FORGETS_BELOW, DecaySums, decay_sums

INF = math.inf


def loop(log_decay, key_mask=None):
    """The definition, one token after the other, on [B, h, S]."""
    sums, first = torch.zeros_like(log_decay, dtype=torch.float64), torch.zeros(log_decay.shape)
    for b in range(log_decay.shape[0]):
        for h in range(log_decay.shape[1]):
            total, start = 0.0, 0
            for j in range(log_decay.shape[2]):
                if key_mask is None or key_mask[b, j]:
                    step = float(log_decay[b, h, j])
                    total, start = (0.0, j) if step == -INF else (total + step, start)
                sums[b, h, j], first[b, h, j] = total, start
    return DecaySums(sums, first.long())


def sample(shape, seed, forgetting=0.2):
    generator = torch.Generator().manual_seed(seed)
    steps = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    return torch.where(torch.rand(shape, generator=generator) < forgetting, -INF, steps)


def mask_of(B, S, seed):
    return torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.7


def same(one, other):
    assert torch.equal(one.first, other.first)
    torch.testing.assert_close(one.sums, other.sums, rtol=0, atol=1e-12)


@pytest.mark.parametrize("S", [0, 1, 2, 33])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_loop(S, masked):
    log_decay = sample((2, 3, S), S)
    key_mask = mask_of(2, S, S + 1) if masked else None
    result = decay_sums(log_decay, key_mask)
    assert result.sums.dtype == torch.float64
    assert result.first.dtype == torch.int64
    same(result, loop(log_decay, key_mask))


def test_masked_keys_advance_nothing_whatever_they_hold():
    log_decay, key_mask = sample((2, 3, 17), 5), mask_of(2, 17, 6)
    expected = decay_sums(log_decay, key_mask)
    for junk in (math.nan, INF, -INF, 1e30):
        spoilt = torch.where(key_mask[:, None], log_decay, junk).requires_grad_()
        result = decay_sums(spoilt, key_mask)
        same(result, expected)
        result.sums.sum().backward()
        assert spoilt.grad.isfinite().all()
        assert not spoilt.grad.masked_select(~key_mask[:, None]).any()


@pytest.mark.parametrize("masked", [False, True])
def test_continued_at_every_split_equals_one_call(masked):
    log_decay = sample((2, 2, 12), 7, forgetting=0.15)
    key_mask = mask_of(2, 12, 8) if masked else None
    whole = decay_sums(log_decay, key_mask)
    for split in range(13):
        masks = (None, None) if key_mask is None else (key_mask[:, :split], key_mask[:, split:])
        head = decay_sums(log_decay[:, :, :split], masks[0])
        tail = decay_sums(log_decay[:, :, split:], masks[1], head)
        same(DecaySums(*(torch.cat(pair, 2) for pair in zip(head, tail, strict=True))), whole)


def test_token_by_token_equals_one_call():
    log_decay = sample((1, 2, 20), 9)
    parts = None
    for j in range(20):
        new = decay_sums(log_decay[:, :, j : j + 1], None, parts)
        parts = new if parts is None else DecaySums(*map(cat2, zip(parts, new, strict=True)))
    same(parts, decay_sums(log_decay))


def cat2(pair):
    return torch.cat(pair, 2)


def test_64k_tokens_keep_differences_that_float32_loses():
    log_decay = -torch.rand(1, 1, 65536, generator=torch.Generator().manual_seed(0)) * 2
    exact = [math.fsum(log_decay[0, 0, -n:].double().tolist()) for n in (1, 2, 100)]
    sums = decay_sums(log_decay).sums[0, 0]
    plain = log_decay[0, 0].cumsum(0)

    def worst(prefix):
        found = [float(prefix[-1] - prefix[-1 - n]) for n in (1, 2, 100)]
        return max(abs(a - b) for a, b in zip(found, exact, strict=True))

    assert worst(sums) < 1e-9
    assert worst(plain) > 1e-3


@pytest.mark.parametrize("huge", [-1e30, torch.finfo(torch.float32).min, FORGETS_BELOW * 1.01])
def test_a_huge_finite_step_forgets_instead_of_drowning_later_steps(huge):
    steps = torch.tensor([[[-1.0, huge, -2.0, -3.0]]], dtype=torch.float64)
    same(decay_sums(steps), decay_sums(torch.tensor([[[-1.0, -INF, -2.0, -3.0]]])))


def test_gradients_are_exact_and_finite_at_minus_infinity():
    log_decay, key_mask = sample((1, 2, 9), 3, 0.0), mask_of(1, 9, 4)
    previous = decay_sums(sample((1, 2, 4), 11, 0.0)).sums

    def sums(x, past):
        return decay_sums(x, key_mask, DecaySums(past, torch.zeros(1, 2, 4).long())).sums

    inputs = (log_decay.requires_grad_(), previous.requires_grad_())
    assert torch.autograd.gradcheck(sums, inputs)
    cut = log_decay.detach().clone()
    cut[:, :, 4] = -INF
    cut.requires_grad_()
    decay_sums(cut).sums[:, :, 6:].sum().backward()
    expected = torch.tensor([0.0, 0, 0, 0, 0, 3, 3, 2, 1], dtype=torch.float64)
    assert torch.equal(cut.grad, expected.expand(1, 2, 9))


def test_per_channel_decays_are_separate_columns():
    log_decay, key_mask = sample((2, 3, 11, 4), 12), mask_of(2, 11, 13)
    whole = decay_sums(log_decay, key_mask)
    head = decay_sums(log_decay[:, :, :5], key_mask[:, :5])
    tail = decay_sums(log_decay[:, :, 5:], key_mask[:, 5:], head)
    for c in range(4):
        same(DecaySums(*(t[..., c] for t in whole)), decay_sums(log_decay[..., c], key_mask))
    same(DecaySums(*map(cat2, zip(head, tail, strict=True))), whole)


def test_inputs_of_any_dtype_are_summed_in_float64():
    log_decay = sample((1, 1, 300), 2, 0.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = log_decay.to(dtype)
        same(decay_sums(rounded), loop(rounded.double()))
