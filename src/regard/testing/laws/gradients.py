"""Laws about gradients."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from regard.testing.law import law
from regard.testing.subject import Subject


@law(cost="cheap")
def gradient(s: Subject) -> None:
    """Gradients of every floating-point input equal those of the reference."""
    for options in s.some_options():
        for forget in (False, True) if "log_decay" in options else (False,):
            call = s.sample(options, forget=forget)
            # Where a decay is -inf the reference has no derivative in it: the others count.
            names = [n for n in call.differentiable if not (forget and n == "log_decay")]
            _, expected = s.gradients(call, names, function=s.reference)
            for dtype in (torch.float64, torch.float32):
                _, actual = s.gradients(call.to(dtype), names)
                s.close_all(call, actual, expected, "gradient", f"options {options}", dtype)
                for name, found in actual.items():
                    s.require(found.dtype == call.to(dtype)[name].dtype, f"dtype of {name}'s")
            if forget:
                _, actual = s.gradients(call)
                finite = bool(actual["log_decay"].isfinite().all())
                s.require(finite, "the gradient of log_decay is not finite at -inf")


@law(cost="costly")
def gradcheck(s: Subject) -> None:
    """The backward is the derivative of the forward, by finite differences in float64."""
    sets = s.option_sets() if s.thorough else list(dict.fromkeys([(), s.all_options]))
    dims: dict[str, Any] = {"B": 1, "H": 2, "Hk": 1, "T": 3, "S": 4, "D": 2, "Dv": 3}
    dims = {name: size for name, size in dims.items() if name not in s.case.dims}
    for options in sets:
        call = s.sample(options, **dims).leaves()
        names = call.differentiable

        def function(*tensors: torch.Tensor, call=call, names=names) -> torch.Tensor:
            return s.run(call.with_tensors(**dict(zip(names, tensors, strict=True))))

        try:
            torch.autograd.gradcheck(
                function,
                tuple(call[name] for name in names),
                fast_mode=not s.thorough,
                atol=1e-6,
                rtol=1e-4,
                nondet_tol=0.0,
            )
        except torch.autograd.gradcheck.GradcheckError as error:
            s.broken(f"options {options}: inputs {names}: {error}", torch.float64)


@law(cost="rotated")
def gradient_subsets(s: Subject) -> None:
    """Any subset of inputs may ask for a gradient: the same gradients and the same output."""
    for dtype, options in itertools.product((torch.float64, torch.float32), s.some_options()):
        call = s.sample(options).to(dtype)
        plain = s.run(call)
        out, expected = s.gradients(call)
        s.close(out, plain, "same", "the output when gradients are asked for")
        names = call.differentiable
        pairs = [(name,) for name in names] + list(itertools.combinations(("q", "k", "v"), 2))
        for subset in pairs:
            out, actual = s.gradients(call, subset)
            s.close(out, plain, "same", f"the output when only {subset} ask for a gradient")
            s.close_all(call, actual, expected, "same", f"only {subset} ask", dtype)
