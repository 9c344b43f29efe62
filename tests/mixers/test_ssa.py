"""The layer of SSA: two streams of one set of weights, drawn together without leaking gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import smooth_l1_loss

from golden_files import parts, settings
from regard.core.budgets import relative_error
from regard.mixers import AlignmentLoss, BoundaryPredictor, SSAAttention
from regard.ops.hierarchical_sparse import boundaries as where

DIM = 24


def layer_of(**settings) -> SSAAttention:
    torch.manual_seed(0)
    return SSAAttention(DIM, 4, 2, block=4, count=2, **settings).double()


def tokens(B: int, T: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(B + T)
    return torch.randn(B, T, DIM, generator=generator, dtype=torch.float64)


def test_both_streams_and_their_loss() -> None:
    layer, x = layer_of(), tokens(2, 21)
    outs = {}
    layer.o_proj.register_forward_pre_hook(lambda m, given: outs.setdefault(len(outs), given[0]))
    sparse, full = layer(x), layer(x, mode="full")
    y, loss = layer(x, mode="both")
    assert torch.equal(y, sparse)
    assert torch.equal(layer(x, mode="both", carry="full")[0], full)
    assert abs(float(loss.detach() - 2 * smooth_l1_loss(outs[0], outs[1]).detach())) < 1e-12


def test_the_loss_reaches_what_was_not_selected_but_not_the_choice() -> None:
    layer, x = layer_of(rope=False), tokens(1, 24)
    values = []

    def keep(module, given, out) -> None:
        out.retain_grad()
        values.append(out)

    layer.v_proj.register_forward_hook(keep)
    layer.count = 1  # the query's own block only
    layer(x, mode="both")[1].backward()
    assert (values[0].grad[0, :4] != 0).all()
    # Of the last block alone: a token of the first one is selected by none of its queries, and
    # what the sparse stream sends there is nothing.
    out = layer(x)
    gradient = torch.autograd.grad(out[0, 20:].sum(), values[-1])[0]
    assert not gradient[0, :20].any()
    gradient = torch.autograd.grad(layer(x, mode="full")[0, 20:].sum(), values[-1])[0]
    assert (gradient[0, :20] != 0).all()


def test_stop_gradients_are_exact() -> None:
    full, sparse = (tokens(1, 5).requires_grad_() for _ in range(2))
    sparse = (sparse * 1.5).detach().requires_grad_()
    loss = AlignmentLoss()(full, sparse)
    to_full, to_sparse = torch.autograd.grad(loss, (full, sparse))
    difference = (full - sparse).detach().clamp(-1, 1) / full.numel()
    assert relative_error(to_full, difference) < 1e-12
    assert relative_error(to_sparse, -difference) < 1e-12


def test_enough_blocks_are_full_attention() -> None:
    layer, x = layer_of(), tokens(2, 21)
    layer.count = 8
    y, loss = layer(x, mode="both")
    assert relative_error(y, layer(x, mode="full")) < 1e-10
    assert float(loss.detach()) < 1e-20


@pytest.mark.parametrize("mode", ["sparse", "full", "nsa"])
def test_decoding_equals_the_parallel_call(mode: str) -> None:
    given = {"nsa": True, "window": 5} if mode == "nsa" else {"mode": mode}
    layer, x = layer_of(**given), tokens(2, 230)
    whole = layer(x)
    with torch.no_grad():
        out, state = layer(x[:, :30], return_state=True)
        outs = [out]
        for t in range(30, 230):
            out, state = layer(x[:, t : t + 1], state=state, return_state=True)
            outs.append(out)
    assert relative_error(torch.cat(outs, 1), whole) < 1e-10


@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_padding_on_either_side_changes_nothing(mode: str) -> None:
    layer, x = layer_of(mode=mode), tokens(2, 19)
    alone = layer(x[:1, :12])
    for shift in (0, 7):
        mask = torch.ones(2, 19, dtype=torch.bool)
        mask[0] = False
        mask[0, shift : shift + 12] = True
        padded = torch.full_like(x, torch.nan)
        padded[1], padded[0, shift : shift + 12] = x[1], x[0, :12]
        y = layer(padded, key_mask=mask)
        assert relative_error(y[:1, shift : shift + 12], alone) < 1e-10
        assert torch.isfinite(y).all()


def test_refusals() -> None:
    layer, x = layer_of(), tokens(1, 8)
    with pytest.raises(ValueError, match="SSAAttention: mode must be one of"):
        layer(x, mode="dense")
    with pytest.raises(ValueError, match="return_state"):
        layer(x, mode="both", return_state=True)
    with pytest.raises(ValueError, match="window must be"):
        layer_of(window=4)
    with pytest.raises(ValueError, match="key_mask must be None with nsa"):
        layer_of(nsa=True, window=4)(x, key_mask=torch.ones(1, 8, dtype=torch.bool))


# -- the boundaries of DHSA ------------------------------------------------------------------


def test_official_boundary_predictor() -> None:
    file, config = parts("dhsa/predictor_attn"), settings("dhsa/predictor_attn")
    model = BoundaryPredictor(
        config["channel_in"], config["d_h"], config["window_size"], config["heads"]
    )
    model.load_state_dict(file["state"])
    x = file["in"]["x"].requires_grad_()
    logits = model.eval()(x)
    assert torch.allclose(logits, file["out"]["logits"], atol=2e-5, rtol=1e-4)
    gradient = torch.autograd.grad(logits, x, file["in"]["grad_out"])[0]
    assert torch.allclose(gradient, file["grad"]["x"], atol=2e-5, rtol=1e-4)


def test_a_predictor_learns_where_segments_end() -> None:
    generator = torch.Generator().manual_seed(0)
    L, C = 128, 16
    directions = 4 * torch.linalg.qr(torch.randn(C, C, generator=generator))[0]

    def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, labels = torch.empty(rows, L, C), torch.zeros(rows, L)
        for row in range(rows):
            at, direction = 0, 0
            while at < L:
                end = min(L, at + int(torch.randint(10, 30, (), generator=generator)))
                step = int(torch.randint(1, C, (), generator=generator))
                direction = (direction + step) % C
                keys[row, at:end] = directions[direction]
                labels[row, end - 1] = float(end < L)
                at = end
        noise = 0.2 * torch.randn(rows, L, C, generator=generator)
        return (keys + noise).transpose(1, 2), labels

    torch.manual_seed(1)
    model = BoundaryPredictor(C, hidden=64, heads=2)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 20) * (1 - step / 200)
    )
    for _ in range(200):
        keys, labels = batch(8)
        optimiser.zero_grad()
        where.boundary_loss(model(keys), labels).backward()
        optimiser.step()
        schedule.step()
    keys, labels = batch(16)
    found = torch.zeros_like(labels, dtype=torch.bool)
    with torch.no_grad():
        for row, logits in enumerate(model(keys)):
            found[row, where.pick_boundaries(logits, count=20, threshold=0.0)] = True
    inner = slice(7, L - 8)
    found, wanted = found[:, inner], labels[:, inner] > 0
    right = (found & wanted).sum()
    assert float(2 * right / (found.sum() + wanted.sum())) >= 0.9
