"""Every query sees all keys, in C, on every instruction set that this machine runs."""

from __future__ import annotations

import pytest
import torch

from ops.samples import Largest, tensors
from regard.core.budgets import relative_error
from regard.explain import explain
from regard.native import instruction_sets, limited_to
from regard.ops.inline import FEATURE_MAPS, inline_attention
from regard.ops.linear import encode, linear_attention, read
from regard.ops.linear.native import whole
from regard.ops.relu_linear import relu_linear_attention

ISAS = instruction_sets()
TOLERANCE = 3e-6  # of float32 results and gradients against float64; found: below 1e-6

pytestmark = pytest.mark.skipif(not ISAS, reason="no native library here")

CALLS = {
    "elu": (linear_attention, {}),
    "sums": (linear_attention, {"feature_map": "identity", "normalise": False, "scale": 0.3}),
    "clamped": (relu_linear_attention, {"minimum": 60.0, "temperature": 1.0}),
    "relu": (relu_linear_attention, {"minimum": 0.0}),
    **{
        f"inline {name}": (inline_attention, {"feature_map": name, "scale": 0.7})
        for name in FEATURE_MAPS
    },
}
# Ragged and whole vectors and blocks of rows, several tiles, several slices, grouped queries.
SHAPES = [
    {"B": 3, "H": 2, "T": 5, "S": 6, "D": 3, "Dv": 2},
    {"B": 2, "H": 4, "Hk": 2, "T": 70, "S": 129, "D": 24, "Dv": 40},
    {"B": 1, "H": 2, "T": 64, "S": 64, "D": 64, "Dv": 64},
    {"B": 1, "H": 1, "Hk": 1, "T": 33, "S": 200, "D": 17, "Dv": 16},
    {"B": 1, "H": 2, "Hk": 1, "T": 2100, "S": 4500, "D": 8, "Dv": 5},
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    with limited_to(request.param):
        yield request.param


def results(op, q, k, v, weight, **options):
    """Output, tensors of the state, and gradients of a loss that sees all of them."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, state = op(*leaves, return_state=True, **options)
    total = (out * weight.to(out)).sum() / len(weight.flatten()) ** 0.5
    parts = {n: x for n, x in state.tensors.items() if x.is_floating_point()}
    total = total + sum((x * 1e-2).sin().sum() for x in parts.values())
    return out, parts, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values_states_and_gradients_are_those_of_float64(isa, name, shape):
    op, options = CALLS[name]
    exact = tensors(**shape)
    single = [x.float() for x in exact]
    assert explain(op, *single, **options).form in ("whole", "centred")
    weight = torch.randn(*exact[0].shape[:3], exact[2].shape[3], dtype=torch.float64)
    out, state, found = results(op, *single, weight, impl="native", **options)
    expected, other, wanted = results(op, *(x.double() for x in single), weight, **options)
    assert relative_error(out, expected) < TOLERANCE
    for part in state:
        assert relative_error(state[part], other[part]) < TOLERANCE, part
    for which, x, y in zip("qkv", found, wanted, strict=True):
        assert relative_error(x, y) < 3 * TOLERANCE, which


def test_keys_of_many_slices_are_joined(isa):
    """Sixteen slices at most: theirs grow with the length."""
    q, k, v = (x.float() for x in tensors(B=1, H=1, Hk=1, T=3, S=40_000, D=4, Dv=3))
    drift = torch.linspace(-3, 3, k.shape[2])[:, None]  # no slice has the mean of all
    out = inline_attention(q, k + drift, v + drift, impl="native")
    exact = inline_attention(q.double(), (k + drift).double(), (v + drift).double())
    assert relative_error(out, exact) < TOLERANCE


def test_an_offset_of_all_keys_and_values_costs_no_digits(isa):
    q, k, v = (x.float() for x in tensors(B=1, T=70, S=300, D=16, Dv=8))
    k, v = k + 1024.0, v + 512.0
    out = inline_attention(q, k, v, impl="native")
    exact = inline_attention(q.double(), k.double(), v.double())
    assert (out - exact).abs().max() < 512 * 3e-7  # one rounding of the mean value


def test_an_odd_first_row_costs_no_digits(isa):
    """Keys are taken about the mean before them, which starts far away here."""
    q, k, v = (x.float() for x in tensors(B=1, T=20, S=300, D=16, Dv=8))
    k[:, :, 0], v[:, :, 0] = 100.0, -50.0
    out = inline_attention(q, k, v, impl="native")
    assert relative_error(out, inline_attention(q.double(), k.double(), v.double())) < TOLERANCE


@pytest.mark.parametrize("name", ["elu", "sums", "clamped"])
def test_a_state_goes_on(isa, name):
    op, options = CALLS[name]
    q, k, v = (x.float() for x in tensors(T=40, S=50))
    _, state = op(q, k[:, :, :20], v[:, :, :20], return_state=True, impl="native", **options)
    out = op(q, k[:, :, 20:], v[:, :, 20:], state=state, impl="native", **options)
    assert relative_error(out, op(q.double(), k.double(), v.double(), **options)) < TOLERANCE


def test_gradients_reach_the_state_before():
    q, k, v = (x.float() for x in tensors(T=9, S=12))

    def gradient(dtype: torch.dtype, impl: str):
        state = encode(k.to(dtype), v.to(dtype))
        leaves = [state[name].requires_grad_() for name in ("S", "z")]
        out = linear_attention(q.to(dtype), k.to(dtype), v.to(dtype), state=state, impl=impl)
        return torch.autograd.grad(out.square().sum(), leaves)

    for x, y in zip(gradient(torch.float32, "native"), gradient(torch.float64, "eager"),
                    strict=True):  # fmt: skip
        assert relative_error(x, y) < 3 * TOLERANCE


def test_encode_and_read_are_halves_of_the_call():
    q, k, v = (x.float() for x in tensors(T=9, S=12))
    memory = encode(k, v, impl="native")
    assert relative_error(read(q, memory, impl="native"), linear_attention(q, k, v)) < TOLERANCE


def test_nothing_depends_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(whole, "LEAST_WORK", 0)
    q, k, v = (x.float() for x in tensors(B=1, H=3, Hk=3, T=2500, S=5000, D=16, Dv=16))
    weight = torch.randn(1, 3, 2500, 16)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, state, gradients = results(inline_attention, q, k, v, weight, impl="native")
            found.append((out, *state.values(), *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_nothing_to_see_and_nobody_to_see_it(isa, name):
    op, options = CALLS[name]
    q, k, v = (x.float() for x in tensors(T=4, S=5))
    assert not op(q, k[:, :, :0], v[:, :, :0], impl="native", **options).any()
    assert op(q[:, :, :0], k, v, impl="native", **options).shape[2] == 0


def test_rows_whose_weight_is_tiny_are_divided_all_the_same(isa):
    q, k, v = (x.float() for x in tensors(B=1, T=3, S=4, D=4, Dv=3))
    q, k = q.abs() * 1e-20, k.abs() * 1e-20  # weights of 1e-40 have no inverse in float32
    out = relu_linear_attention(q, k, v, minimum=0.0, temperature=1.0, impl="native")
    exact = relu_linear_attention(q.double(), k.double(), v.double(), minimum=0.0, temperature=1.0)
    assert torch.isfinite(out).all()
    assert relative_error(out, exact) < 1e-2  # such weights have few digits left


def test_what_is_made_on_the_way_does_not_grow_with_the_length():
    """Results and nothing else: no features, no centred keys."""
    q, k, v = (torch.randn(1, 1, 65536, 16) for _ in range(3))
    with Largest() as largest:
        inline_attention(q, k, v, impl="native")
    assert largest.elements <= q.numel()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, "key_mask"),
        ({"chunk_size": 4}, "chunk_size"),
        ({"scale": torch.tensor(1.0), "normalise": False}, "one scale"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_refuses(options, why):
    q, k, v = (x.float() for x in tensors(B=2, T=4, S=5))
    with pytest.raises(ValueError, match=why):
        linear_attention(q, k, v, impl="native", **options)
    with pytest.raises(ValueError, match="float32"):
        linear_attention(q.double(), k.double(), v.double(), impl="native")


@pytest.mark.parametrize("normaliser", [0, 1, 2, whole.CENTRED])
def test_operators_pass_opcheck(normaliser):
    q, k, v = (x.float().requires_grad_() for x in tensors(B=1, T=6, S=5))
    S = z = None
    if normaliser != whole.CENTRED:
        S = torch.randn(1, k.shape[1], k.shape[3], v.shape[3])
        z = torch.rand(1, k.shape[1], k.shape[3]) if normaliser else None
    options = "relu", "elu", 0.5, normaliser, 2.0
    torch.library.opcheck(torch.ops.regard.linear_whole_native_fwd, (q, k, v, S, z, *options))
    out = whole.whole(q, k, v, S, z, *options)
    gradients = [torch.randn_like(x) for x in out]
    torch.library.opcheck(
        torch.ops.regard.linear_whole_native_bwd,
        (*gradients, *(x.detach() for x in (q, k, v, *out[1:])), *options),
    )
