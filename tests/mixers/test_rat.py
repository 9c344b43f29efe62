"""The layers of RAT."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import regard
from mixers.subjects import DIM, jolt, tokens
from regard.core.budgets import budget, relative_error
from regard.mixers import GatedRNN, Rat

GOLDEN = Path(__file__).parents[1] / "golden/rat/layer_c4.safetensors"
LAYERS = {
    "rat": lambda **more: Rat(DIM, 4, chunk_length=3, **more),
    "rat with a residual": lambda **more: Rat(DIM, 4, chunk_length=3, residual=True, **more),
    "recurrent": lambda **more: GatedRNN(DIM, longest=9, **more),
}


def layer_of(name: str, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return jolt(LAYERS[name](**settings)).to(dtype)


def check_close(actual, expected, quantity="value", dtype=None):
    assert relative_error(actual, expected) <= budget(dtype or actual.dtype, quantity)


def golden(part: str) -> dict[str, torch.Tensor]:
    found = load_file(GOLDEN)
    return {n.removeprefix(part): t for n, t in found.items() if n.startswith(part)}


def authors_layer() -> Rat:
    layer = Rat(32, 4, chunk_length=4, residual=True)
    layer.load_state_dict(golden("state."))
    return layer


def test_is_the_layer_of_the_authors():
    layer = authors_layer()
    x = golden("in.")["hidden_states"].requires_grad_()
    y = layer(x)
    y.backward(golden("in.")["grad_out"])
    check_close(y, golden("out.")["hidden_states"])
    expected = golden("grad.")
    check_close(x.grad, expected.pop("hidden_states"), "gradient")
    for name, gradient in expected.items():
        check_close(layer.get_parameter(name).grad, gradient, "gradient")


def test_decodes_as_the_authors_do_behind_the_first_chunk_and_within_it():
    layer, x, out = authors_layer(), golden("in.")["hidden_states"], golden("out.")
    outputs, state = [], None
    with torch.no_grad():
        for token in x.split(1, 1):
            y, state = layer(token, state=state, return_state=True)
            outputs.append(y)
    check_close(torch.cat(outputs, 1), out["hidden_states"])
    check_close(torch.cat(outputs[4:], 1), out["decode_after_first_chunk"])
    held = state["attention"]
    check_close(held["ends_k"], out["cache_k_chunks"][:, :, :-1])
    check_close(held["ends_v"], out["cache_v_chunks"][:, :, :-1])
    check_close(held["k"].flatten(1), out["cache_k_last_state"][:, 0])
    check_close(held["v"].flatten(1), out["cache_v_last_state"][:, 0])


def test_is_the_op_on_what_the_formula_says():
    layer, x = layer_of("rat"), tokens(2, 7)
    z, v, gate, q, k = (x @ layer.in_proj.weight.mT).split([16, 16, 16, 8, 8], 2)
    gate = torch.sigmoid(gate + layer.gate_bias)
    q, k = (torch.cat([part, part], 2) for part in (q, k))  # groups 0 1 0 1: tiled
    heads = (part.view(2, 7, 4, 4).transpose(1, 2) for part in (q, k, v, gate))
    out = regard.ops.rat_attention(*heads, chunk_length=3, rope=True)
    out = torch.sigmoid(z) * out.transpose(1, 2).reshape(2, 7, DIM)
    check_close(layer(x), out @ layer.out_proj.weight.mT)


def test_the_recurrent_layer_is_what_the_formula_says():
    layer, x = layer_of("recurrent"), tokens(2, 7)
    z, v, gate = (x @ layer.in_proj.weight.mT).chunk(3, 2)
    gate, h, rows = torch.sigmoid(gate + layer.gate_bias), 0.0, []
    for t in range(7):
        h = gate[:, t] * h + (1 - gate[:, t]) * v[:, t]
        rows.append(torch.sigmoid(z[:, t]) * h)
    check_close(layer(x), torch.stack(rows, 1) @ layer.out_proj.weight.mT)


def test_one_long_chunk_is_the_recurrent_layer():
    rat, rnn, x = Rat(DIM, 4, chunk_length=50).double(), GatedRNN(DIM).double(), tokens(2, 20)
    with torch.no_grad():
        rnn.in_proj.weight.copy_(rat.in_proj.weight[: 3 * DIM])
        rnn.gate_bias.copy_(rat.gate_bias)
        rnn.out_proj.weight.copy_(rat.out_proj.weight)
    check_close(rat(x), rnn(x))


def test_a_residual_is_around_a_norm():
    plain, whole, x = layer_of("rat"), layer_of("rat with a residual"), tokens(2, 5)
    plain.load_state_dict({n: t for n, t in whole.state_dict().items() if n != "input_norm.weight"})
    check_close(whole(x), x + plain(whole.input_norm(x)))


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_learns(name):
    layer = layer_of(name)
    (layer(tokens(2, 8)) * tokens(2, 8, seed=3)).sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def test_gates_start_with_memories_of_up_to_a_chunk():
    torch.manual_seed(0)
    bias = Rat(256, 4, chunk_length=16).gate_bias.exp()
    assert 1 <= bias.min() < 1.5
    assert 14 < bias.max() <= 15
    assert abs(float(bias.detach().mean()) - 8) < 1
    assert not Rat(16, 4, chunk_length=2).gate_bias.any()
    assert not Rat(16, 4, chunk_length=1).gate_bias.any()  # memory that was never set, there
    assert GatedRNN(256, longest=100).gate_bias.exp().max() > 90


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_a_ragged_batch(name):
    layer = layer_of(name)
    rows = [tokens(1, 9, seed=1), tokens(1, 6, seed=2)]
    x = torch.full((2, 9, DIM), torch.nan, dtype=torch.float64)
    mask = torch.tensor([[1] * 9, [0, 1, 0, 1, 1, 1, 0, 1, 1]]).bool()
    for row, real in enumerate(rows):
        x[row, mask[row]] = real[0]
    with torch.no_grad():
        whole = layer(x, key_mask=mask)
        state, outputs = None, []
        for piece, known in zip(x.split([4, 1, 4], 1), mask.split([4, 1, 4], 1), strict=True):
            y, state = layer(piece, key_mask=known, state=state, return_state=True)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        for row, real in enumerate(rows):
            alone = layer(real)[0]
            check_close(y[row, mask[row]], alone)
            check_close(whole[row, mask[row]], alone)
        if not layer.residual:
            assert not whole[~mask].any()


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_do_not_meet(name):
    layer, x = layer_of(name), tokens(1, 9)
    offsets = torch.tensor([0, 5, 9], dtype=torch.int32)
    alone = torch.cat([layer(x[:, :5]), layer(x[:, 5:])], 1)
    check_close(layer(x, cu_seqlens=offsets), alone)


@pytest.mark.parametrize("name", LAYERS)
def test_states_are_chosen_and_forked(name):
    layer, x = layer_of(name), tokens(3, 8)
    order = torch.tensor([2, 0, 2])
    with torch.no_grad():
        _, state = layer(x[:, :5], return_state=True)
        again = layer(x[:, 5:], state=state.fork())
        check_close(again, layer(x)[:, 5:])
        check_close(layer(x[order, 5:], state=state.select(order)), layer(x[order])[:, 5:])


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_and_autocast(name):
    layer = layer_of(name, torch.float32)
    x = tokens(2, 9, dtype=torch.float32)
    expected = copy.deepcopy(layer).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert relative_error(found, expected) < 2 * budget(torch.bfloat16)
    half = copy.deepcopy(layer).bfloat16()
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    wide = copy.deepcopy(half).double()(x.bfloat16().double())
    assert relative_error(y, wide) < 2 * budget(torch.bfloat16)


def test_compiles_whole():
    torch._dynamo.reset()
    layer, x = layer_of("rat", torch.float32), tokens(2, 7, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    check_close(compiled(x), layer(x), "same")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rat(DIM, 4, causal=False), "Rat: causal must be True: it is a recurrence"),
        (lambda: GatedRNN(DIM, causal=False), "GatedRNN: causal must be True"),
        (lambda: Rat(DIM, 4, groups=3), "Rat: groups must be a divisor of heads, 4, got 3"),
        (lambda: Rat(DIM, 4, chunk_length=0), "Rat: chunk_length must be an int of at least 1"),
        (lambda: Rat(DIM, 3), "Rat: dim must be a multiple of heads, 3"),
        (lambda: Rat(6, 2), "Rat: rope must be False where head_dim is odd, here 3"),
        (lambda: Rat(DIM, 4, dropout=1.0), "Rat: dropout must be a probability below 1"),
        (lambda: GatedRNN(DIM, longest=0), "GatedRNN: longest must be an int of at least 1"),
        (lambda: GatedRNN(DIM)(torch.zeros(1, 2, 3)), "GatedRNN: x must be of shape [batch, lengt"),
        (lambda: Rat(DIM, 4)(torch.zeros(1, 2, DIM), state=3), "Rat: state must be None or a Stat"),
    ],
)
def test_a_wrong_setting_is_named(make, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert message in str(caught.value)


def test_a_state_of_another_layer_is_refused():
    x = tokens(2, 4)
    _, state = layer_of("rat")(x, return_state=True)
    with pytest.raises(ValueError, match="state must be one of rat"):
        layer_of("recurrent")(x, state=state)
    with pytest.raises(ValueError, match="state must be of x's batch size 1, got one of 2"):
        layer_of("rat")(x[:1], state=state)
