"""Registration of compiled forms as `regard::<name>` operators of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("regard", "FRAGMENT")
_defined: dict[str, tuple[str, str, str]] = {}


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers `regard::<name><schema>` for every backend and returns it, callable.

    `schema` is torch's, arguments and results: `"(Tensor q, bool causal) -> Tensor"`; tensors
    and scalars only, states flattened. `fake` gives shapes and dtypes without computing.
    `backward` and `setup_context` are those of `torch.library.register_autograd`; a backward
    calls another registered op, which has none of its own. An op without one raises when a
    gradient through it is asked for (torch alone would warn and leave the gradient out), so a
    double backward raises.

    A Library op costs half of what `torch.library.custom_op` costs per call. Defining the same
    op once more (a module that is loaded again) changes nothing; another op of that name raises.
    """
    full = f"regard::{name}"
    identity = (schema, implementation.__module__, implementation.__qualname__)
    if full in _defined:
        if _defined[full] != identity:
            raise ValueError(f"{full} is already defined, by {'.'.join(_defined[full][1:])}")
        return getattr(torch.ops.regard, name)
    _library.define(name + schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(full, fake, lib=_library)
    if "!" not in schema:  # torch knows no derivative of an op that writes into its arguments
        torch.library.register_autograd(
            full, backward or _refuse_gradient(full), setup_context=setup_context, lib=_library
        )
    if vmap is not None:
        torch.library.register_vmap(full, vmap, lib=_library)
    _defined[full] = identity
    return getattr(torch.ops.regard, name)


def _refuse_gradient(full: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            f"{full} has no derivative; where it is the backward pass of an op, that op is "
            'differentiable once (impl="reference" is differentiable twice)'
        )

    return refuse
