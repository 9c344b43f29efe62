"""What follows the operators of a call."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from regard.core.watched import is_watched


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_nobody_by_default_and_with_gradients() -> None:
    x = torch.ones(1, requires_grad=True)
    assert not is_watched()
    (x * 2).sum().backward()
    assert not is_watched()


def test_each_of_those_who_follow() -> None:
    with _Mode():
        assert is_watched()
    with forward_ad.dual_level():
        assert is_watched()
    found = []
    torch.func.vmap(lambda x: found.append(is_watched()) or x)(torch.ones(2))
    assert found == [True]
    assert not is_watched()


def test_a_tracer_sees_that_it_traces() -> None:
    traced = torch.compile(lambda x: x + is_watched(), backend="eager", fullgraph=True)
    assert torch.equal(traced(torch.zeros(2)), torch.ones(2))
