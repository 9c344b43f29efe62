"""What small models with different mechanisms learn: the published order, in seconds each.

The models hold as little as they can: one head of 16 channels between linear maps. A mechanism
that should take part is one class in `MECHANISMS`.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, rms_norm, softplus

from regard import ops
from regard.recipes import Optimiser, evaluate, train_small
from regard.tasks import MQAR, InContextRegression

SIZE = 16  # of the head


class Softmax(nn.Module):
    """Queries and keys of norm sqrt(SIZE); the logarithm of the score scale is learned.

    `token` [B, T, dim] is what the queries were made from, for mechanisms that want more of it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), -0.5 * math.log(SIZE)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, token: Tensor) -> Tensor:
        q, k = rms_norm(q, (SIZE,)), rms_norm(k, (SIZE,))
        return self.attend(q, k, v, self.log_scale.exp())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return ops.softmax_attention(q, k, v, causal=True, scale=scale)


class LocalLinear(Softmax):
    """The ridge is learned too."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.theta = nn.Parameter(torch.zeros(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        ridge = softplus(self.theta) + 1e-3
        return ops.local_linear_attention(q, k, v, causal=True, scale=scale, ridge=ridge)


class Parallax(Softmax):
    """The probe is one more projection of the query's token, normalised like the query."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.r = nn.Linear(dim, SIZE, bias=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, token: Tensor) -> Tensor:
        q, r, k = (rms_norm(x, (SIZE,)) for x in (q, self.r(token)[:, None], k))
        scale = self.log_scale.exp()
        return ops.parallax_attention(q, r, k, v, causal=True, scale=scale)


class Mesa(nn.Module):
    """Queries and keys of norm 1; one decay, .95 at first, and the ridge are learned."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.full((1,), 3.0))
        self.theta = nn.Parameter(torch.zeros(1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, token: Tensor) -> Tensor:
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        log_decay = logsigmoid(self.decay).expand(*k.shape[:-1])
        ridge = softplus(self.theta) + 0.05
        return ops.mesa_attention(q, k, v, causal=True, log_decay=log_decay, ridge=ridge)


class Linear(nn.Module):
    """The plain sum of v_j (k_j . q): no feature map, no norm, nothing learned."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, token: Tensor) -> Tensor:
        return ops.linear_attention(q, k, v, causal=True, feature_map="identity", normalise=False)


MECHANISMS = {
    "softmax": Softmax,
    "local_linear": LocalLinear,
    "parallax": Parallax,
    "mesa": Mesa,
    "linear": Linear,
}


class Regressor(nn.Module):
    """Queries and keys from x, values from y; strictly causal: keys are one shorter."""

    def __init__(self, mechanism: nn.Module, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, SIZE, bias=False) for _ in range(3))
        self.o = nn.Linear(SIZE, dim, bias=False)
        self.mechanism = mechanism

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.q(x)[:, None], self.k(x[:, :-1])[:, None], self.v(y[:, :-1])[:, None]
        return self.o(self.mechanism(q, k, v, x)[:, 0])


class Recaller(nn.Module):
    """One residual layer; the key of a token also sees the token before, by two learned taps."""

    def __init__(self, mechanism: nn.Module, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.taps = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.q, self.k, self.v = (nn.Linear(dim, SIZE, bias=False) for _ in range(3))
        self.o = nn.Linear(SIZE, dim, bias=False)
        self.norm = nn.RMSNorm(dim)
        self.out = nn.Linear(dim, vocabulary, bias=False)
        self.mechanism = mechanism

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        shifted = self.taps[0] * x + self.taps[1] * before
        q, k, v = self.q(x), self.k(shifted), self.v(x)
        mixed = self.mechanism(q[:, None], k[:, None], v[:, None], x)[:, 0]
        return self.out(self.norm(x + self.o(mixed)))


def build(make: type[nn.Module], mechanism: str, dim: int, *sizes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(MECHANISMS[mechanism](dim), *sizes)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_models_never_see_the_answer(mechanism):
    (x, y), _ = InContextRegression(length=24, segment=8).sample(2, torch.Generator())
    model = build(Regressor, mechanism, 5, 5)
    before = model(x, y)
    assert not before[:, 0].any()
    x, y = x.clone(), y.clone()
    x[:, 13:], y[:, 12:] = 1e4, -1e4
    assert torch.equal(model(x, y)[:, :13], before[:, :13])
    (tokens,), _ = MQAR(64, 32, 4).sample(2, torch.Generator())
    model = build(Recaller, mechanism, 8, 64, 8)
    before = model(tokens)
    tokens[:, 20:] = 1
    assert torch.equal(model(tokens)[:, :20], before[:, :20])


# Mean squared errors of an earlier run with weights and streams of its own. Ours, with seeds
# 0, 1, 2: local_linear .1316 .1314 .1312, softmax .1676 .1677 .1676, linear .673 .668, and with
# other weights and streams still: parallax .1647 .1639 .1649, mesa .1322 .1321 .1323.
REGRESSION = {
    "local_linear": 0.130,
    "mesa": 0.137,
    "parallax": 0.162,
    "softmax": 0.165,
    "linear": 0.636,
}


@pytest.mark.slow
def test_in_context_regression_comes_out_in_the_published_order():
    task = InContextRegression(dim=5, segment=32, length=96)
    found = {}
    for mechanism in MECHANISMS:
        model = build(Regressor, mechanism, task.dim, task.dim)
        train_small(model, task, 700, optimiser=Optimiser(5e-3))
        found[mechanism] = evaluate(model, task, batches=8)
        print(mechanism, {name: f"{value:.4f}" for name, value in found[mechanism].items()})
    errors = {name: score["error"] for name, score in found.items()}
    for name, expected in REGRESSION.items():
        assert errors[name] == pytest.approx(expected, rel=0.1)
    assert errors["local_linear"] <= 0.85 * errors["softmax"]  # .785
    assert errors["parallax"] <= 1.02 * errors["softmax"]  # .983; seeds 1, 2: .979 .979
    assert errors["local_linear"] <= errors["parallax"]
    linear = errors.pop("linear")
    assert linear >= 3 * max(errors.values())  # 4.0
    # By the end of the last segment: .059, .092, .567. Mesa with a learned decay, .041, does
    # better there, so that no order between it and local_linear is asked for.
    ends = {name: score["error/end"] for name, score in found.items()}
    assert ends["local_linear"] < 0.75 * ends["softmax"]


RECALL = MQAR(vocabulary=128, length=64, pairs=16, power=1.0)


@functools.cache
def accuracies(mechanism: str) -> list[float]:
    """On the batches of steps 100, 200, ... 700, which the model has never seen."""
    model = build(Recaller, mechanism, 64, RECALL.vocabulary, 64)
    settings = Optimiser(4e-3, weight_decay=0.01)
    history = train_small(model, RECALL, 700, optimiser=settings)
    curve = history.curve("accuracy")
    assert [step for step, _ in curve] == list(range(100, 701, 100))
    print(mechanism, *(f"{value:.3f}" for _, value in curve))
    return [value for _, value in curve]


# Measured, seed 0 (512 answers each):
#   softmax       .012 .102 1 1 1 1 1
#   local_linear  .012 .100 1 1 1 1 1
#   parallax      .012 .893 .994 .996 1 .998 1
#   mesa          .008 .027 .969 .988 .990 .998 .996
# Mesa has just enough state, 16 x 16 for 16 pairs, and nears 1 slowly: with two other seeds
# .984 .992 .998 .998 and .984 .986 .996 1 from step 400 on.
@pytest.mark.slow
@pytest.mark.parametrize("mechanism", [name for name in MECHANISMS if name != "linear"])
def test_recall_of_as_many_pairs_as_channels_is_learnt(mechanism):
    found = accuracies(mechanism)
    assert found[0] < 0.1  # it was not there from the start
    assert found[-1] >= 0.99
    if mechanism != "mesa":
        assert min(found[3:]) >= 0.99  # from step 400 on


@pytest.mark.slow
def test_local_linear_learns_recall_in_no_more_steps_than_mesa():
    def needed(mechanism: str) -> int:
        return next(i for i, accuracy in enumerate(accuracies(mechanism)) if accuracy >= 0.99)

    # Steps 300 and 500; with two other seeds 400 and 500, 200 and 600.
    assert needed("local_linear") <= needed("mesa")


@pytest.mark.slow
def test_a_plain_sum_does_not_learn_recall():
    # Measured, seed 0: .006 .055 .061 .059 .062 .053 .059; 1/16 is to guess among the values of
    # the context. Scaling changes this, as 16 channels can hold 16 pairs: with the norms and the
    # learned scale of the others the sum reached .96, divided by the number of keys seen .98,
    # with all of it .66.
    assert max(accuracies("linear")) < 0.15
