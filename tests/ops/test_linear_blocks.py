"""A long problem taken in pieces is the problem."""

from __future__ import annotations

import pytest
import torch

from regard.ops.linear.engine import Rule, by_rule, encode, read
from regard.ops.linear.features import ELU
from regard.ops.linear.learned_features import learned
from regard.ops.linear.native.blocks import in_blocks
from regard.ops.linear.problem import Problem
from regard.ops.linear.recurrent import recurrent

solve = by_rule(lambda problem: Rule(encode, read, recurrent if problem.causal else None))


def problem(T: int = 23, **changed) -> Problem:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, T, 5, generator=make) for h in (4, 2, 2))
    log_decay = -torch.rand(2, 2, T, generator=make)
    mask = torch.rand(2, T, generator=make) < 0.8
    given = Problem(
        q, k, v, True, ELU, ELU, key_mask=mask, log_decay=log_decay, normaliser="sum",
        wants_state=True,
    )  # fmt: skip
    return given._replace(**changed)


def test_pieces_are_the_whole():
    given = problem()
    whole, parts = solve(given), in_blocks(solve, 5)(given)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other)
    later = problem(S=whole.S, z=whole.z, wants_state=False)
    out = in_blocks(solve, 5)(later)
    torch.testing.assert_close(out.out, solve(later).out)
    assert out.S is None


def test_gradients_pass_from_piece_to_piece():
    found = []
    for run in (solve, in_blocks(solve, 5)):
        given = problem()
        leaves = [x.clone().requires_grad_() for x in (given.q, given.k, given.v, given.log_decay)]
        start = torch.full((2, 2, 5, 5), 0.3, requires_grad=True)
        total = torch.full((2, 2, 5), 0.7, requires_grad=True)
        q, k, v, log_decay = leaves
        whole = given._replace(q=q, k=k, v=v, log_decay=log_decay, S=start, z=total)
        out, S, z = run(whole)
        loss = out.sin().sum() + S.cos().sum() + z.sum()
        found.append(torch.autograd.grad(loss, (*leaves, start, total)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_learned_maps_and_a_second_backward(tied):
    found = []
    for run in (solve, in_blocks(solve, 5)):
        make = torch.Generator().manual_seed(1)
        maps = [torch.randn(1 if tied else h, 5, 3, generator=make) for h in (4, 2)]
        maps = [x.requires_grad_() for x in maps]
        if tied:
            maps[1] = maps[0]
        twice = [2 * x for x in maps] if not tied else [2 * maps[0]] * 2
        of_q, of_k = (
            learned(x, None, "softmax_dim", True, False, of_queries=queries)
            for x, queries in zip(twice, (True, False), strict=True)
        )
        given = problem(query_map=of_q, key_map=of_k, log_decay=None)
        leaves = [x.clone().requires_grad_() for x in (given.q, given.k, given.v)]
        given = given._replace(**dict(zip("qkv", leaves, strict=True)))
        loss = run(given).out.sin().sum()
        inputs = (*leaves, *maps[: 1 if tied else 2])
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = torch.autograd.grad(loss, inputs)
        assert all(map(torch.equal, first, again))
        found.append(first)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_where_it_helps():
    seen: list[int] = []

    def counted(piece: Problem):
        seen.append(piece.q.shape[2])
        return solve(piece)

    run = in_blocks(counted, 10)
    run(problem())
    assert seen == [10, 10, 3]
    for changed in (
        {"causal": False}, {"q": problem().q[:, :, :7]},
        {"query_map": Problem._field_defaults["query_map"],
         "key_map": Problem._field_defaults["key_map"]},
    ):  # fmt: skip
        seen.clear()
        run(problem(**changed))
        assert len(seen) == 1
