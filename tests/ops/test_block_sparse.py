"""Block-sparse attention: the plan is followed exactly, at every resolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from golden_files import parts, settings
from ops.samples import megabytes_over_inputs, tensors
from regard.core.budgets import relative_error
from regard.ops import block_sparse_attention, selected_attention, softmax_attention
from regard.ops.block_sparse import BlockPlan

LEVELS = torch.tensor([0, 1, 2, 4, 8])


def levels_for(T: int, S: int, block_q: int, block_k: int, heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, heads, -(-T // block_q), -(-S // block_k))
    return LEVELS[torch.randint(5, shape, generator=generator)]


@pytest.mark.parametrize("tail", ["exact", "replicate"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("T", "S", "block_q", "block_k", "plan_heads"),
    [(100, 100, 16, 32, 4), (37, 90, 16, 24, 2), (90, 37, 8, 8, 1)],
)
def test_every_level_and_operand(T, S, block_q, block_k, plan_heads, causal, tail):
    inputs = [x.requires_grad_() for x in tensors(T=T, S=S, D=8, Dv=6)]
    bias = torch.randn(2, 2, S, dtype=torch.float64, requires_grad=True)
    options = {
        "block_q": block_q, "block_k": block_k, "causal": causal, "tail": tail,
        "key_mask": torch.rand(2, S, generator=torch.Generator().manual_seed(1)) > 0.2,
        "key_bias": bias, "window": (30, 5), "scale": 0.4,
    }  # fmt: skip
    levels = levels_for(T, S, block_q, block_k, plan_heads, seed=T)
    found, expected = (
        block_sparse_attention(*inputs, levels, impl=impl, **options)
        for impl in ("eager", "reference")
    )
    assert relative_error(found, expected) < 1e-12
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (*inputs, bias), weight),
        torch.autograd.grad(expected, (*inputs, bias), weight),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [(16, 16), (128, 64)])
def test_a_full_plan_is_dense_attention(block: tuple[int, int], causal: bool):
    q, k, v = tensors(T=150, S=150, D=16, Dv=16, dtype=torch.float32)
    levels = torch.ones(1, 1, -(-150 // block[0]), -(-150 // block[1]), dtype=torch.int8)
    out = block_sparse_attention(q, k, v, levels, block_q=block[0], block_k=block[1], causal=causal)
    assert relative_error(out, softmax_attention(q, k, v, causal=causal)) < 1e-6


@pytest.mark.parametrize(
    "impl", ["reference", "eager", pytest.param("native", marks=pytest.mark.requires("native"))]
)
def test_a_plan_of_bools_is_one_of_zeros_and_ones(impl: str):
    q, k, v = tensors(T=50, S=70, D=16, Dv=16, dtype=torch.float32)
    levels = levels_for(50, 70, 16, 16, 2, seed=3).clamp(max=1)
    found, expected = (
        block_sparse_attention(q, k, v, plan, block_q=16, block_k=16, impl=impl)
        for plan in (levels.bool(), levels)
    )
    assert torch.equal(found, expected)
    with pytest.raises(TypeError, match="selected must be a tensor of integers"):
        selected_attention(q, k, v, torch.ones(1, 1, 50, 1).bool(), block=16)


def test_equal_tokens_weigh_the_same_pooled():
    q, k, v = tensors(T=96, S=96, D=8, Dv=8)
    k, v = (x[:, :, ::8].repeat_interleave(8, 2) for x in (k, v))
    levels = levels_for(96, 96, 16, 16, 1, seed=3).clamp(min=1)
    out = block_sparse_attention(q, k, v, levels, block_q=16, block_k=16)
    assert relative_error(out, softmax_attention(q, k, v)) < 1e-12
    bias = torch.randn(2, 1, 96, dtype=torch.float64)  # within a group as well
    out = block_sparse_attention(q, k, v, levels, block_q=16, block_k=16, key_bias=bias)
    assert relative_error(out, softmax_attention(q, k, v, key_bias=bias)) < 1e-12


def test_rows_without_anything_are_zero_and_send_no_gradient():
    inputs = [x.requires_grad_() for x in tensors(T=32, S=32)]
    levels = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    levels[..., 1, 0] = 1
    out = block_sparse_attention(*inputs, levels, block_q=8, block_k=8)
    assert not out[:, :, :8].any()
    assert not out[:, :, 16:].any()
    assert out[:, :, 8:16].all()
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[1][:, :, 8:].any()
    assert gradients[1][:, :, :8].all()


def test_causality_of_random_plans():
    q, k, v = tensors(T=64, S=64, dtype=torch.float32)
    levels = levels_for(64, 64, 8, 8, 4, seed=5)
    options = {"block_q": 8, "block_k": 8, "causal": True}
    before = block_sparse_attention(q, k, v, levels, **options)
    for t in (7, 30, 33):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, :, t + 1 :] = 1e4
        after = block_sparse_attention(*later, levels, **options)
        assert torch.equal(after[:, :, : t + 1], before[:, :, : t + 1])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_selected_blocks_and_tokens(heads: int):
    q, k, v = (x.requires_grad_() for x in tensors(T=45, S=60))
    generator = torch.Generator().manual_seed(heads)
    for block, block_q in ((8, 1), (1, 1), (16, 10)):
        shape = (2, heads, -(-45 // block_q), 5)
        selected = torch.randint(-1, -(-60 // block), shape, generator=generator)
        found, expected = (
            selected_attention(
                q, k, v, selected, block=block, block_q=block_q, causal=True, impl=impl
            )
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


@pytest.mark.parametrize("name", ["attn_new_n128", "attn_old_causal"])
def test_official_pyramid_kernels(name: str):
    file = parts(f"pyramid_sparse_attention/{name}")
    q, k, v = (file["in"][n].float().requires_grad_() for n in "qkv")
    causal = settings(f"pyramid_sparse_attention/{name}")["causal"]
    out = block_sparse_attention(q, k, v, file["in"]["level"], causal=causal, tail="replicate")
    assert torch.allclose(out, file["out"]["o"], atol=2e-5, rtol=1e-4)
    if "grad_out" in file["in"]:
        found = torch.autograd.grad(out, (q, k, v), file["in"]["grad_out"].float())
        for n, gradient in zip("qkv", found, strict=True):
            assert torch.allclose(gradient, file["grad"][n], atol=2e-5, rtol=1e-4)


def test_official_selected_attention():
    file = parts("ssa/op_ssa")
    q, k, v = (file["in"][n].transpose(1, 2).clone().requires_grad_() for n in "qkv")
    gate = file["in"]["g_slc"].clone().requires_grad_()
    chosen = file["out"]["selected"]
    selected = torch.where(chosen, torch.arange(chosen.shape[-1]), -1)
    out = selected_attention(q, k, v, selected, block=8, causal=True).transpose(1, 2)
    out = out * gate[..., None]
    assert torch.allclose(out, file["out"]["o"], atol=2e-5, rtol=1e-4)
    *found, d_gate = torch.autograd.grad(out, (q, k, v, gate), file["in"]["grad_out"])
    for n, gradient in zip("qkv", found, strict=True):
        assert torch.allclose(gradient.transpose(1, 2), file["grad"][n], atol=1e-4)
    assert torch.allclose(d_gate, file["grad"]["g_slc"], atol=1e-4)


@pytest.mark.parametrize("levels", [[[1, 3]], [[1, -1]], [[16, 0]]])
def test_levels_outside_the_set_are_refused(levels: list[list[int]]):
    q, k, v = tensors(T=8, S=16)
    with pytest.raises(ValueError, match=r"levels must be in \{0, 1, 2, 4, 8\}"):
        block_sparse_attention(q, k, v, torch.tensor([[levels]]), block_q=8, block_k=8)


def test_a_level_that_does_not_divide_the_block_is_refused():
    q, k, v = tensors(T=8, S=12)
    with pytest.raises(ValueError, match=r"in \{0, 1, 2\} with blocks of 6"):
        block_sparse_attention(q, k, v, torch.tensor([[[[1, 4]]]]), block_q=8, block_k=6)


def test_wrong_plans_are_refused_by_name():
    q, k, v = tensors(T=8, S=8)
    with pytest.raises(ValueError, match=r"levels must be of shape \[1 or 2, 1 or 2 or 4, 2, 2\]"):
        block_sparse_attention(q, k, v, torch.ones(1, 1, 2, 3).long(), block_q=4, block_k=4)
    with pytest.raises(TypeError, match="levels must be a tensor of integers"):
        block_sparse_attention(q, k, v, torch.ones(1, 1, 2, 2), block_q=4, block_k=4)
    with pytest.raises(ValueError, match=r"selected must be in \[-1, 2\)"):
        selected_attention(q, k, v, torch.full((1, 1, 8, 1), 2), block=4)


class TestPlan:
    def plan(self) -> BlockPlan:
        levels = levels_for(50, 50, 16, 16, 2, seed=0)
        return BlockPlan(levels, 50, 50, 16, 16, grid=(5, 10))

    def test_for_attention_is_bool_where_nothing_is_pooled(self):
        kept = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int8)
        plan = BlockPlan(kept, 16, 16, 8, 8)
        assert plan.for_attention().dtype == torch.bool
        assert torch.equal(plan.for_attention(), plan.levels.bool())
        kept[..., 0] = 4  # somebody writes to a plan
        assert torch.equal(plan.for_attention(), kept)
        assert self.plan().for_attention().dtype == torch.int8
        with torch.inference_mode():  # such tensors do not count what is written to them
            plan = BlockPlan(kept.clone().clamp(max=1), 16, 16, 8, 8)
        assert plan.for_attention().dtype == torch.int8

    def test_density_is_the_work(self):
        levels = torch.tensor([[[[1, 0], [2, 4]]]])
        assert BlockPlan(levels, 16, 16, 8, 8).density() == (1 + 0.5 + 0.25) / 4
        assert BlockPlan(levels, 16, 16, 8, 8).density(causal=True) == (1 + 0.5 + 0.25) / 3

    def test_save_and_load(self, tmp_path):
        plan = self.plan()
        plan.save(tmp_path / "plan.safetensors")
        again = BlockPlan.load(tmp_path / "plan.safetensors", grid=(5, 10))
        assert torch.equal(again.levels, plan.levels)
        assert (again.T, again.S, again.block_q, again.block_k) == (50, 50, 16, 16)
        with pytest.raises(ValueError, match="was made for the grid"):
            BlockPlan.load(tmp_path / "plan.safetensors", grid=(10, 5))

    def test_damaged_and_foreign_files_are_refused(self, tmp_path):
        file = tmp_path / "plan.safetensors"
        self.plan().save(file)
        content = file.read_bytes()
        for cut in (0, 10, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:cut])
            with pytest.raises(ValueError, match="is damaged"):
                BlockPlan.load(file)
        for place in range(8, len(content)):  # one bit of the header or of the tensors
            changed = bytearray(content)
            changed[place] ^= 1
            file.write_bytes(changed)
            with pytest.raises(ValueError, match="is damaged|is not a saved"):
                BlockPlan.load(file)
        from safetensors.torch import save_file

        save_file({"levels": torch.zeros(1)}, file)
        with pytest.raises(ValueError, match="is not a saved block plan"):
            BlockPlan.load(file)

    def test_validate(self):
        plan = self.plan()
        q, k, _ = tensors(T=50, S=50)
        assert plan.validate(q, k, grid=(5, 10)) is plan
        with pytest.raises(ValueError, match="made for 50 queries and 50 keys, got 49"):
            plan.validate(q[:, :, 1:], k)
        with pytest.raises(ValueError, match=r"batch rows and heads"):
            plan.validate(q[:1], k[:1])
        with pytest.raises(ValueError, match="levels must be of shape"):
            BlockPlan(plan.levels, 80, 50, 16, 16)
        with pytest.raises(ValueError, match=r"levels must be in"):
            BlockPlan(plan.levels + 16, 50, 50, 16, 16)

    def test_dense_mask(self):
        mask = self.plan().to_dense_mask()
        assert mask.shape == (2, 2, 50, 50)
        assert mask[0, 0, 0, 0] == (self.plan().levels[0, 0, 0, 0] > 0)

    def test_picture(self, tmp_path):
        self.plan().draw(tmp_path / "plan.png")
        assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_memory_at_16384_tokens(backward: bool):
    options = "levels=(torch.rand(1, 1, *[-(-given[0].shape[2] // 128)] * 2) < 0.2).long()"
    op = "regard.ops:block_sparse_attention"
    used = megabytes_over_inputs(op, 16384, backward=backward, options=options)
    assert used < (64 if not backward else 128), used
