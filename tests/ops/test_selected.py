"""Attention to the most important blocks: the choice is the authors', and so is the output."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from golden_files import parts, settings
from ops.samples import megabytes_over_inputs, tensors
from regard.core.budgets import relative_error
from regard.ops import block_topk, block_topk_attention, nsa_attention, softmax_attention
from regard.ops.selected.nsa import compressed_attention
from regard.ops.selected.reference import block_topk_attention_reference


def heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).clone().requires_grad_()


def chosen_map(selected: Tensor, blocks: int) -> Tensor:
    found = selected.new_zeros(*selected.shape[:3], blocks + 1, dtype=torch.bool)
    found.scatter_(3, torch.where(selected < 0, blocks, selected), True)
    return found[..., :blocks]


@pytest.mark.parametrize("name", ["op_ssa", "op_nsa"])
def test_official_choice_output_and_gradients(name: str) -> None:
    file, config = parts(f"ssa/{name}"), settings(f"ssa/{name}")
    q, k, v = (heads_first(file["in"][n]) for n in "qkv")
    sizes = {"block": config["block_size"], "count": config["block_counts"]}
    expected = file["out"]["selected"]
    found = chosen_map(block_topk(q, k, **sizes), expected.shape[3])
    assert torch.equal(found, expected)
    gates = {n: heads_first(file["in"][n]) for n in ("g_slc", "g_cmp", "g_swa") if n in file["in"]}
    names = {"g_slc": "gate_selected", "g_cmp": "gate_compressed", "g_swa": "gate_window"}
    given = {names[n]: gate for n, gate in gates.items()}
    out = nsa_attention(q, k, v, **given, **sizes, window=config["window_size"]).transpose(1, 2)
    assert torch.allclose(out, file["out"]["o"], atol=2e-5, rtol=1e-4)
    wanted = {**dict(zip("qkv", (q, k, v), strict=True)), **gates}
    gradients = torch.autograd.grad(out, tuple(wanted.values()), file["in"]["grad_out"])
    for n, gradient in zip(wanted, gradients, strict=True):
        assert torch.allclose(gradient.transpose(1, 2), file["grad"][n], atol=1e-4), n


@pytest.mark.parametrize(("T", "S"), [(29, 29), (7, 29), (1, 32), (29, 12)])
@pytest.mark.parametrize("block", [1, 4, 5])
def test_compressed_branch(T: int, S: int, block: int) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(T=T, S=S))
    scale = torch.rand(q.shape[1], dtype=q.dtype) + 0.3
    n = S // block
    means = [x[:, :, : n * block].unflatten(2, (n, block)).mean(3) for x in (k, v)]
    ends = (torch.arange(n) + 1) * block - 1
    hidden = ends > torch.arange(T)[:, None] + S - T
    bias = torch.zeros(T, n, dtype=q.dtype).masked_fill(hidden, -torch.inf)
    expected = softmax_attention(q, *means, bias=bias, scale=scale)
    found = compressed_attention(q, k, v, block, scale)
    assert relative_error(found, expected) < 1e-12
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), weight),
        torch.autograd.grad(expected, (q, k, v), weight),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-12


def test_enough_blocks_are_dense_attention() -> None:
    q, k, v = (x.float().requires_grad_() for x in tensors(T=45, S=45))
    out = block_topk_attention(q, k, v, block=8, count=6)
    dense = softmax_attention(q, k, v, causal=True)
    assert relative_error(out, dense) < 1e-5
    weight = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), weight),
        torch.autograd.grad(dense, (q, k, v), weight),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("group", [1, 3, 4, 32])
def test_groups_of_any_size(group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    q = torch.randn(1, 2 * group, 27, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, 27, 8, generator=generator, dtype=torch.float64)
    for block, count in ((2, 8), (4, 2), (5, 1)):  # fewer keys in a block than blocks, too
        out = block_topk_attention(q, k, v, block=block, count=count)
        expected = block_topk_attention_reference(q, k, v, block=block, count=count)
        assert relative_error(out, expected) < 1e-12


def test_counts_are_rounded_up_to_a_power_of_two() -> None:
    q, k, _ = tensors(T=60, S=60)
    assert block_topk(q, k, block=4, count=3).shape[3] == 4
    assert torch.equal(block_topk(q, k, block=4, count=3), block_topk(q, k, block=4, count=4))


def test_the_choice_sends_no_gradient_and_the_own_block_is_first() -> None:
    q, k, _ = (x.requires_grad_() for x in tensors(T=33, S=33))
    chosen = block_topk(q, k, block=4, count=4)
    assert not chosen.requires_grad
    assert torch.equal(chosen[..., 0], (torch.arange(33) // 4).expand(chosen.shape[:3]))


def test_a_decoding_step_after_crop_and_fork() -> None:
    q, k, v = tensors(T=50, S=50, dtype=torch.float32)
    whole = block_topk_attention(q, k, v, block=4, count=2)

    def call(a: int, b: int, state=None):
        return block_topk_attention(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], block=4, count=2, state=state,
            return_state=True,
        )  # fmt: skip

    _, state = call(0, 40)
    _, later = call(40, 47, state)
    again = later.crop(38)
    for t in range(38, 50):
        with torch.inference_mode(t % 3 == 0):
            out, again = call(t, t + 1, again)
            assert relative_error(out, whole[:, :, t : t + 1]) < 1e-6


def test_refusals() -> None:
    q, k, v = tensors(T=8, S=8)
    with pytest.raises(ValueError, match="block_topk_attention: causal must be True"):
        block_topk_attention(q, k, v, block=2, count=2, causal=False)
    with pytest.raises(ValueError, match="nsa_attention: window must be"):
        nsa_attention(q, k, v, block=2, count=2, gate_window=q[..., 0])
    with pytest.raises(ValueError, match="block_topk: count must be"):
        block_topk(q, k, block=2, count=0)


@pytest.mark.slow
def test_speed_at_16k() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 16, 16384, 64, generator=generator)
    k, v = torch.randn(2, 1, 1, 16384, 64, generator=generator)
    times = []
    for run in (
        lambda: block_topk_attention(q, k, v, block=64, count=16),
        lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k.expand_as(q), v.expand_as(q), is_causal=True
        ),
    ):
        before = time.process_time()
        run()
        times.append(time.process_time() - before)
    assert times[1] > 3 * times[0], times


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_memory_at_16k(backward: bool) -> None:
    op, options = "regard.ops.selected:block_topk_attention", "block=64, count=16"
    used = megabytes_over_inputs(op, 16384, backward=backward, options=options)
    assert used < (64 if not backward else 128), used


@pytest.mark.slow
def test_a_decoding_step_hardly_depends_on_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    least = []
    for S in (16384, 65536):
        q = torch.randn(1, 16, 60, 64, generator=generator)
        k, v = torch.randn(2, 1, 1, S + 60, 64, generator=generator)
        options = {"block": 64, "count": 16, "return_state": True}
        _, state = block_topk_attention(q[:, :, :1], k[:, :, :S], v[:, :, :S], **options)
        times = []
        for t in range(60):
            new = q[:, :, t : t + 1], k[:, :, S + t : S + t + 1], v[:, :, S + t : S + t + 1]
            before = time.process_time()
            _, state = block_topk_attention(*new, **options, state=state)
            times.append(time.process_time() - before)
        least.append(min(times))
    assert least[1] < 1.3 * least[0], least
