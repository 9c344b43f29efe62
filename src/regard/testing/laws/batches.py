"""Laws about how calls are laid out: packed, strided, alone or in a batch, once or twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.testing.calls import Call
from regard.testing.law import DoesNotApply, law
from regard.testing.subject import Subject


@law(needs=("cu_seqlens",), cost="cheap")
def packed(s: Subject) -> None:
    """Packed sequences equal separate ones, in value and gradient, empty ones among them."""
    s.free_lengths()
    queries = (5, 1, 0, 7, 3)
    if not s.pattern.cross:
        _packed(s, queries, queries)
        return
    if not s.card.accepts("cu_seqlens_k"):
        raise DoesNotApply("the op has no argument cu_seqlens_k")
    _packed(s, queries, (4, 2, 3, 0, 6))
    _packed(s, queries, (4, 2, 3, 0, 7))  # as many keys as queries, differently divided


def _packed(s: Subject, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    for options in s.some_options(("bias",)):
        call = s.sample(options, B=1, T=sum(queries), S=sum(keys))
        together = call.with_options(cu_seqlens=_ends(queries, s.device))
        if s.pattern.cross:
            together = together.with_options(cu_seqlens_k=_ends(keys, s.device))
        for dtype in (torch.float64, torch.float32):

            def apart(given: Call) -> Tensor:
                outputs, t, k = [], 0, 0
                for T, S in zip(queries, keys, strict=True):
                    outputs.append(s.run(given.narrow("t", t, t + T).narrow("s", k, k + S)))
                    t, k = t + T, k + S
                return torch.cat(outputs, 2)

            expected, wanted = s.gradients(call.to(dtype), function=apart)
            out, found = s.gradients(together.to(dtype))
            what = f"packed {queries} x {keys}, options {options}"
            s.close(out, expected, "same", what)
            s.close_all(call, found, wanted, "gradient", what, dtype)


def _ends(lengths: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


@law(cost="rotated")
def noncontiguous(s: Subject) -> None:
    """Strided inputs give what contiguous ones give, in value and gradient."""
    for options in s.some_options():
        call = s.sample(options).to(torch.float32)
        expected, wanted = s.gradients(call)
        for name, stride in (("heads last", _heads_last), ("every other", _every_other)):
            strided = call.map(lambda _, t, stride=stride: stride(t))
            s.close(s.run(strided), expected, "same", f"{name}, options {options}")
            leaves = strided.map(lambda _, t: t.requires_grad_(t.is_floating_point()))
            out = s.run(leaves)
            names = leaves.differentiable
            found = torch.autograd.grad(
                out,
                [leaves[n] for n in names],
                s.cotangent(out),
                materialize_grads=True,
                allow_unused=True,
            )
            gradients = dict(zip(names, found, strict=True))
            what = f"{name}, options {options}"
            s.close_all(call, gradients, wanted, "same", what, torch.float32)
        axes = call.axes
        one = call.map(lambda n, t, axes=axes: t[:1].expand_as(t) if axes[n][0] == "b" else t)
        copied = one.map(lambda _, t: t.contiguous())
        s.close(s.run(one), s.run(copied), "same", f"expanded (stride 0), options {options}")


def _heads_last(tensor: Tensor) -> Tensor:
    """The layout of a projection that was viewed as heads: [B, T, H, D] seen as [B, H, T, D]."""
    if tensor.dim() < 3:
        return _every_other(tensor)
    return tensor.transpose(1, 2).contiguous().transpose(1, 2).detach()


def _every_other(tensor: Tensor) -> Tensor:
    double = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    double[..., ::2] = tensor
    return double[..., ::2].detach()


@law(cost="rotated")
def inputs_unmodified(s: Subject) -> None:
    """Arguments are read, never written, with and without gradients."""
    for options in s.some_options():
        call = s.sample(options).to(torch.float32)
        before = call.map(lambda _, t: t.clone())
        versions = {name: t._version for name, t in call.tensors.items()}
        s.run(call)
        leaves = call.map(lambda _, t: t.requires_grad_(t.is_floating_point()))
        out = s.run(leaves)
        aliases = {t.untyped_storage().data_ptr() for t in call.tensors.values()}
        own = out.untyped_storage().data_ptr() not in aliases
        s.require(own, "the output shares memory with an argument")
        out.backward(s.cotangent(out))
        for name, tensor in call.tensors.items():
            what = f"{name}, options {options}"
            s.require(tensor._version == versions[name], f"{what}: was written to")
            s.identical(tensor.detach(), before[name], f"{what}: after the call")


@law(cost="rotated")
def batch_invariance(s: Subject) -> str | None:
    """A sequence alone gives what it gives in a batch."""
    bitwise = True
    for options in s.some_options():
        for dtype in (torch.float64, torch.float32):
            call = s.sample(options, B=3).to(dtype)
            whole, gradients = s.gradients(call)
            weight = s.cotangent(whole)
            for row in range(3):
                what = f"row {row} alone, options {options}"
                one = call.rows(torch.tensor([row]))
                names = [n for n in call.differentiable if call.axes[n][0] == "b"]
                out, found = s.gradients(one, names, weight=weight[row : row + 1])
                s.close(out, whole[row : row + 1], "same", what)
                bitwise = bitwise and torch.equal(out, whole[row : row + 1])
                expected = {name: gradients[name][row : row + 1] for name in names}
                s.close_all(one, found, expected, "same", what, dtype)
    return None if bitwise else "equal within rounding, not bit for bit"


@law(cost="rotated")
def deterministic(s: Subject) -> None:
    """Twice the same call, twice the same bits."""
    for options in s.some_options():
        call = s.sample(options).to(torch.float32)
        first, gradients = s.gradients(call)
        for _ in range(2):
            again, found = s.gradients(call)
            s.identical(again, first, f"the output of a second call, options {options}")
            for name, gradient in found.items():
                s.identical(gradient, gradients[name], f"the second gradient of {name}")


@law(cost="rotated")
def random_state(s: Subject) -> None:
    """The global random generators are left as they were found, by every form."""
    for options in s.some_options():
        call = s.sample(options).to(torch.float32)
        asked: list[dict[str, Any]] = [{"impl": impl} for impl in s.available(call.leaves())]
        for extra in ({}, *asked):
            with torch.random.fork_rng([] if s.device == "cpu" else [s.device]):
                # A state that no op would set: one that seeds would else find what it left.
                torch.manual_seed(int(torch.randint(2**40, (1,), generator=s.generator("state"))))
                before = _generators(s.device)
                s.run(call, **extra)
                s.gradients(call, **extra)
                for device, state in _generators(s.device).items():
                    same = torch.equal(state, before[device])
                    s.require(same, f"the random state of {device} changed, {extra}, {options}")


def _generators(device: str) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device != "cpu":
        states[device] = torch.cuda.get_rng_state(device)
    return states
