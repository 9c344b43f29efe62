"""Laws about half precision and autocast."""

from __future__ import annotations

import torch

from regard.core.budgets import allowed_of_half, relative_error
from regard.core.checks import name_of
from regard.testing.law import law
from regard.testing.subject import Subject


def _half(s: Subject, dtype: torch.dtype) -> str:
    worst = 0.0
    for options in s.some_options():
        call = s.sample(options)
        exact = s.reference(call)
        out = s.run(call.to(dtype))
        s.require(out.dtype == dtype, f"the output is {out.dtype}")
        rounded = call.to(dtype).to(torch.float64)
        inputs = relative_error(s.reference(rounded), exact)
        own = s.card.budgets.get(name_of(dtype), (None, ""))[0]
        output = relative_error(exact.to(dtype), exact)
        allowed = allowed_of_half(dtype, inputs, output, s.device, own)
        error = relative_error(out, exact)
        if not error <= allowed:
            s.broken(
                f"options {options}: error {error:.3g} against float64 on the unrounded inputs; "
                f"rounding the inputs alone gives {inputs:.3g}, so {allowed:.3g} is allowed",
                dtype,
            )
        worst = max(worst, error / allowed)
        _, expected = s.gradients(rounded, function=s.reference)
        _, actual = s.gradients(call.to(dtype))
        for name, gradient in actual.items():
            s.require(gradient.dtype == call.to(dtype)[name].dtype, f"gradient dtype of {name}")
        s.close_all(call, actual, expected, "gradient", f"options {options}", dtype)
    return f"error at most {worst:.2f} of what is allowed"


@law(cost="cheap")
def bfloat16(s: Subject) -> str:
    """bfloat16 inputs err at most 1.5 times what rounding them does, plus rounding the output."""
    return _half(s, torch.bfloat16)


@law(cost="rotated")
def float16(s: Subject) -> str:
    """As bfloat16; off a CPU within the budget, as products there round to 16 bits once more."""
    return _half(s, torch.float16)


@law(cost="rotated")
def autocast(s: Subject) -> None:
    """Autocast computes what inputs of its dtype give; mixed q, k, v belong to one call."""
    for options in s.some_options():
        call = s.sample(options).to(torch.float32)
        expected, wanted = s.gradients(call.to(torch.bfloat16))

        def cast(given, **extra):
            with torch.autocast(s.device, torch.bfloat16):
                return s.run(given, **extra)

        out, gradients = s.gradients(call, function=cast)
        s.require(out.dtype == torch.bfloat16, f"the output under autocast is {out.dtype}")
        s.identical(out, expected, f"under autocast, options {options}")
        for name, gradient in gradients.items():
            s.require(gradient.dtype == torch.float32, f"gradient of {name} is {gradient.dtype}")
        s.close_all(call, gradients, wanted, "gradient", "under autocast", torch.bfloat16)
        mixed = call.with_tensors(v=call["v"].to(torch.bfloat16))
        s.identical(cast(mixed), expected, "under autocast with v in bfloat16 already")
        double = call.to(torch.float64)
        s.identical(cast(double), s.run(double), "float64 under autocast")
