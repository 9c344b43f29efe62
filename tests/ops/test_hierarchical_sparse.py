"""Dynamic hierarchical sparse attention: choices, masks and labels are the authors'."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from golden_files import parts, settings
from ops.samples import megabytes_over_inputs, tensors
from regard.core.budgets import relative_error
from regard.ops import (
    block_mask,
    block_sparse_attention,
    hierarchical_sparse_attention,
    softmax_attention,
    token_sparse_attention,
)
from regard.ops.hierarchical_sparse import boundaries as where
from regard.ops.hierarchical_sparse import chunk_scores, fixed_chunks, select_tokens


def official(name: str) -> tuple[dict, dict, dict]:
    file = parts(f"dhsa/{name}")
    return file["in"], file["out"], settings(f"dhsa/{name}")


@pytest.mark.parametrize("name", ["select_attend_a", "select_attend_global"])
def test_official_attention_and_choice(name: str) -> None:
    given, expected, config = official(name)
    q, k, v, ends = (given[n] for n in ("q", "k", "v", "boundaries"))
    n, block = config["instruction_tokens"], config["block_size"]
    scores = chunk_scores(q, k, ends, block=block, instruction=n)
    options = {
        "queries": q.shape[2], "keys": k.shape[2], "block": block,
        "budget": config["topk_tokens"], "local": config["local_tokens"],
    }  # fmt: skip
    listed = expected["topk_indices"].long()
    found = select_tokens(scores, ends, **options)
    for b in range(len(listed)):
        for i, (ours, theirs) in enumerate(zip(found[b, 0], listed[b], strict=True)):
            ours = {t for t in ours.tolist() if t >= 0}
            theirs = {t for t in theirs.tolist() if t < (i + 1) * block}
            cut = {int((ends[b] > t).nonzero()[0]) for t in ours ^ theirs}
            assert len(cut) <= 1, "more than one chunk was cut"
            assert len(ours) == len(theirs)
    # The attention, with the authors' lists: what they put into the first places is ours, too.
    lists = listed[:, None].clone()
    count = config["global_tokens"]
    if count:
        lists[..., :count] = select_tokens(scores, ends, **options, global_=count)[..., :count]
    for compat in (None, "official"):
        out = token_sparse_attention(
            q, k, v, lists, block=block, instruction=n, scale=config["scaling"], compat=compat
        )
        assert torch.allclose(out, expected["o"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "a", "vertical_slash", "vertical_slash_block"])
def test_official_masks(kind: str) -> None:
    given, expected, config = official("v2_masks_a")
    found = block_mask(
        given["q"].float(), given["k"].float(), kind=kind, count=config["topk_blocks"],
        block_q=config["q_block_size"], block_k=config["k_block_size"],
        vertical=config["vertical_slash_ratio"],
    )  # fmt: skip
    assert torch.equal(found.bool(), expected[f"mask_{'a_shape' if kind == 'a' else kind}"])


def test_masks_of_odd_lengths_leave_no_query_alone() -> None:
    q, k, v = tensors(T=300, S=300, D=8, Dv=8, dtype=torch.float32)
    for kind in ("a", "vertical_slash", "vertical_slash_block"):
        mask = block_mask(q, k, kind=kind, count=2, block_q=64, block_k=32)
        assert mask.shape == (*q.shape[:2], 5, 10)
        out = block_sparse_attention(q, k, v, mask, block_q=64, block_k=32, causal=True)
        assert (out != 0).any(3).all(), kind
        full = block_mask(q, k, kind=kind, count=12, block_q=64, block_k=32)
        out = block_sparse_attention(q, k, v, full, block_q=64, block_k=32, causal=True)
        assert relative_error(out, softmax_attention(q, k, v, causal=True)) < 1e-5


def test_official_labels_and_loss() -> None:
    given, expected, config = official("labels_a")
    ratios = where.boundary_ratios(given["attn"], window=config["window"])[0]
    assert torch.allclose(ratios, expected["ratios"], rtol=1e-6, atol=1e-6)
    soft = where.soft_labels(ratios)
    assert torch.allclose(soft.float(), expected["soft_label"], atol=1e-6)
    options = {
        "threshold": config["theta"], "count": config["max_boundaries"],
        "instruction": config["instruction_tokens"],
    }  # fmt: skip
    found = where.pick_boundaries(ratios, **options, apart=config["nms"])
    assert found.tolist() == expected["selected"].tolist()
    found = where.pick_boundaries(ratios, **options, apart=0)
    assert found.tolist() == expected["selected_no_nms"].tolist()
    labels = where.boundary_labels(given["attn"], window=config["window"])
    loss = where.boundary_loss(given["logits"], labels, window=config["window"])
    assert abs(float(loss - expected["loss"])) < 1e-5


@pytest.mark.parametrize("window", [None, (30, 0)])
def test_the_whole_budget_is_dense_attention(window: tuple[int, int] | None) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(T=90, S=90))
    out = hierarchical_sparse_attention(
        q, k, v, block=16, budget=90, chunk=7, window=window, instruction=5, causal=True
    )
    dense = softmax_attention(q, k, v, causal=True, window=window)
    assert relative_error(out, dense) < 1e-10
    weight = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), weight),
        torch.autograd.grad(dense, (q, k, v), weight),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-9


@pytest.mark.parametrize(("T", "S"), [(37, 37), (21, 40), (40, 21)])
@pytest.mark.parametrize(
    "options",
    [
        {"block": 8, "budget": 14, "chunk": 5, "window": (11, 0), "instruction": 3},
        {"block": 4, "budget": 9, "chunk": 3, "per_head": True, "global_": 2, "local": 2},
        {"block": 16, "budget": 20, "chunk": 6, "pooling": "max", "normalise": False},
    ],
)
def test_causal_calls_equal_the_reference(T: int, S: int, options: dict) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(T=T, S=S))
    found, expected = (
        hierarchical_sparse_attention(q, k, v, causal=True, impl=impl, **options)
        for impl in ("eager", "reference")
    )
    assert relative_error(found, expected) < 1e-12
    weight = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), weight),
        torch.autograd.grad(expected, (q, k, v), weight),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-10


def test_later_keys_and_values_are_not_read() -> None:
    q, k, v = tensors(T=64, S=64, dtype=torch.float32)
    ends = fixed_chunks(64, 8, q.device)
    scores = chunk_scores(q, k, ends, block=16)
    options = {"queries": 64, "keys": 64, "block": 16, "budget": 24, "local": 16}
    indices = select_tokens(scores, ends, **options)
    before = token_sparse_attention(q, k, v, indices, block=16, instruction=0)
    for t in (7, 31, 40):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, :, t + 1 :] = 1e4
        after = token_sparse_attention(*later, indices, block=16, instruction=0)
        assert torch.equal(after[:, :, : t + 1], before[:, :, : t + 1])


def test_scores_do_not_depend_on_the_length_of_a_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 4096 * 17, 16, generator=generator)
    q = torch.randn(1, 1, 64, 16, generator=generator)
    spreads = {}
    for normalise in (True, False):
        for length in (4, 64):
            ends = fixed_chunks(2048 * length // 2, length, q.device)
            scores = chunk_scores(q, k[:, :, : ends[0, -1]], ends, block=1, normalise=normalise)
            spreads[normalise, length] = float(scores.std())
    assert abs(spreads[True, 4] / spreads[True, 64] - 1) < 0.2
    assert 3.2 < spreads[False, 4] / spreads[False, 64] < 4.8  # sqrt(64 / 4)


def test_a_needle_is_found_at_its_boundaries() -> None:
    generator = torch.Generator().manual_seed(1)
    recall = {"true": 0.0, "fixed": 0.0}
    L, block, D = 2048, 64, 32
    for trial in range(12):
        q = torch.randn(1, 1, L, D, generator=generator) * 0.3
        k = torch.randn(1, 1, L, D, generator=generator)
        at = 64 * (3 + trial) - 8  # it straddles two fixed chunks
        target = torch.randn(D, generator=generator)
        q[:, :, -block:] += target
        k[:, :, at : at + 16] += 0.35 * target
        kinds = {
            "true": torch.tensor([[*range(0, at, 37), at, *range(at + 16, L, 41), L]]).unique()[
                None
            ],
            "fixed": fixed_chunks(L, 64, q.device),
        }
        for name, ends in kinds.items():
            scores = chunk_scores(q, k, ends, block=block)
            chosen = select_tokens(
                scores, ends, queries=L, keys=L, block=block, budget=int(0.06 * L), local=0
            )
            needle = set(range(at, at + 16))
            recall[name] += len(needle & set(chosen[0, 0, -1].tolist())) / 16 / 12
    assert recall["true"] >= 0.95
    assert recall["true"] > recall["fixed"]


def piecewise(L: int, D: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys constant over pieces of random lengths, and the ends of the pieces."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 90, (L // 8,), generator=generator).cumsum(0)
    ends = torch.cat([torch.tensor([0]), lengths[lengths < L], torch.tensor([L])])
    rows = torch.randn(len(ends) - 1, D, generator=generator)
    return rows.repeat_interleave(ends.diff(), 0), ends[None]


def test_chunks_of_the_data_are_better_than_fixed_ones() -> None:
    errors = {"dynamic": 0.0, "fixed": 0.0}
    for seed in range(4):
        keys, ends = piecewise(1024, 16, seed)
        generator = torch.Generator().manual_seed(seed)
        k = keys[None, None] + 0.1 * torch.randn(1, 1, 1024, 16, generator=generator)
        v = torch.randn(1, 1, 1024, 16, generator=generator)
        q = 2 * keys[torch.randint(1024, (16,), generator=generator)].repeat_interleave(64, 0)
        q = q[None, None]
        exact = softmax_attention(q, k, v)
        for name, given in (("dynamic", ends), ("fixed", None)):
            # By means: products of whole chunks are compared, whatever their lengths.
            out = hierarchical_sparse_attention(
                q, k, v, block=64, budget=128, chunk=64, boundaries=given, local=0,
                normalise=False,
            )  # fmt: skip
            errors[name] += relative_error(out, exact)
    assert errors["dynamic"] < 0.8 * errors["fixed"], errors


def test_ragged_rows_share_a_number_of_chunks() -> None:
    q, k, v = tensors(T=40, S=40)
    ends = torch.tensor([[0, 10, 25, 40, 40], [0, 5, 6, 30, 40]])
    options = {"block": 8, "budget": 20, "causal": True}
    both = hierarchical_sparse_attention(q, k, v, boundaries=ends, **options)
    first = hierarchical_sparse_attention(q[:1], k[:1], v[:1], boundaries=ends[:1, :4], **options)
    assert relative_error(both[:1], first) < 1e-12


def test_refusals() -> None:
    q, k, v = tensors(T=8, S=8)
    with pytest.raises(ValueError, match="hierarchical_sparse_attention: window must be None"):
        hierarchical_sparse_attention(q, k, v, window=(4, 0))
    with pytest.raises(TypeError, match="boundaries"):
        hierarchical_sparse_attention(q, k, v, boundaries=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="block_mask: kind"):
        block_mask(q, k, kind="slash")


@pytest.mark.slow
def test_speed_at_16k() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 16384, 64, generator=generator).unbind(0)
    runs = (
        lambda: hierarchical_sparse_attention(q, k, v, block=256, budget=2048, causal=True),
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    times = [[], []]
    for _ in range(3):
        for run, found in zip(runs, times, strict=True):
            before = time.process_time()
            run()
            found.append(time.process_time() - before)
    assert min(times[1]) > 3 * min(times[0]), times


@pytest.mark.slow
def test_memory_at_16k() -> None:
    op = "regard.ops:hierarchical_sparse_attention"
    used = megabytes_over_inputs(op, 16384, options="block=256, budget=2048")
    assert used < 64, used  # a map of one head would be 1024
