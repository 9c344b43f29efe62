"""Laws about what torch does with an op: inference mode, meta tensors, compile, export, opcheck."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from regard.core.patterns import Pattern
from regard.testing.calls import Call
from regard.testing.law import DoesNotApply, law
from regard.testing.laws.states import advance
from regard.testing.subject import Subject


@law(cost="rotated")
def inference_mode(s: Subject) -> None:
    """Inference mode gives the same output, from tensors made inside and outside of it."""
    for options in s.some_options():
        call = s.sample(options).to(torch.float32)
        expected = s.run(call)
        with torch.inference_mode():
            s.close(s.run(call), expected, "same", f"options {options}")
            inside = call.map(lambda _, t: t.clone())
            s.close(s.run(inside), expected, "same", f"tensors made inside, options {options}")
    if s.card.state and s.pattern is Pattern.CAUSAL_SELF and "T" not in s.case.dims:
        call = s.sample(tuple(o for o in s.all_options if o != "bias"), T=6, S=6)
        call = call.to(torch.float32)
        expected = s.run(call)[:, :, 4:]
        with torch.inference_mode():
            _, state = advance(s, call.narrow("ts", 0, 4), None)
            out, _ = advance(s, call.narrow("ts", 4, 6), state)
        s.close(out, expected, "same", "decoding")


@law(cost="cheap")
def meta(s: Subject) -> None:
    """Meta tensors give shape and dtype without computing."""
    for options in s.option_sets():
        for dtype in (torch.float32, torch.bfloat16):
            call = s.sample(options).to(dtype)
            out, real = s.run(call.on("meta")), s.run(call)
            what = f"options {options}: {out.dtype} {list(out.shape)} on {out.device}"
            s.require(out.is_meta, what)
            s.require(out.shape == real.shape and out.dtype == real.dtype, what)


def _sets(s: Subject) -> list[tuple[str, ...]]:
    """Plain and with all options together, or every set when thorough."""
    return s.option_sets() if s.thorough else list(dict.fromkeys([(), s.all_options]))


@law(cost="costly")
def compile(s: Subject) -> None:
    """Compiled whole (fullgraph, at two lengths) equals eager, in value and gradient."""
    fixed = {"T", "S"} & set(s.case.dims)
    for options in _sets(s):
        torch._dynamo.reset()
        compiled = torch.compile(s.card.op, fullgraph=True, backend="aot_eager")
        # The second length makes torch trace with symbolic sizes.
        for dims, differentiable in (({"T": 7}, s.thorough), ({"T": 11}, True)):
            lengths: dict[str, Any] = {} if fixed else dims
            call = s.sample(options, **lengths).to(torch.float32)
            what = f"compiled, {dims}, options {options}"
            if not differentiable or s.thorough:
                with torch.no_grad():
                    s.close(compiled(**call.arguments), s.run(call), "same", what)
            if differentiable:
                expected, wanted = s.gradients(call)
                run = partial(_run, compiled)
                out, found = s.gradients(call, function=run)
                s.close(out, expected, "same", what)
                s.close_all(call, found, wanted, "same", what, torch.float32)
    torch._dynamo.reset()


def _run(op: Any, call: Call) -> Tensor:
    return op(**call.arguments)


class _Module(torch.nn.Module):
    def __init__(self, op: Any, call: Call) -> None:
        super().__init__()
        self.op, self.options = op, dict(call.options)

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.op(**tensors, **self.options)


@law(cost="costly")
def export(s: Subject) -> None:
    """`torch.export` keeps the op whole, and the exported program gives the same output."""
    for options in _sets(s):
        call = s.sample(options).to(torch.float32)
        module = _Module(s.card.op, call)
        program = torch.export.export(module, (dict(call.tensors),))
        out = program.module()(dict(call.tensors))
        s.close(out, s.run(call), "same", f"exported, options {options}")


class OperatorCalls(TorchDispatchMode):
    """Records the first call of every `regard::` operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "regard":
            self.calls.setdefault(str(func), (func, args, kwargs))
        return func(*args, **kwargs)


@law(cost="costly")
def opcheck(s: Subject) -> str:
    """Every `regard::` operator that the op calls passes torch's own `opcheck`."""
    found = OperatorCalls()
    for options in s.option_sets():
        call = s.sample(options).to(torch.float32)
        trained = s.available(call.leaves())  # some forms have no gradients here
        with found:
            for impl in s.available(call) or (None,):
                chosen = call if impl is None else call.with_options(impl=impl)
                if impl is None or impl in trained:
                    s.gradients(chosen)
                s.run(chosen)
    if not found.calls:
        raise DoesNotApply("it calls no regard:: operator")
    for name, (operator, args, kwargs) in found.calls.items():
        final = "_bwd" in name  # a backward operator has no derivative of its own
        args, kwargs = tree_map_only(
            Tensor,
            lambda t, final=final: t.detach().clone().requires_grad_(t.requires_grad and not final),
            (args, kwargs),
        )
        try:
            torch.library.opcheck(operator, args, kwargs)
        except Exception as error:  # whatever opcheck raises is its verdict
            s.broken(f"{name}: {type(error).__name__}: {error}")
    return ", ".join(found.calls)
