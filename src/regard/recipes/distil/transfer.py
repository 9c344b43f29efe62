"""Teacher and student on the same q, k and v; what the layers after them see is the teacher's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.adapt.learned import Learned
from regard.adapt.swapped import ATTRIBUTE
from regard.core.checks import reject
from regard.mixers import Hedgehog
from regard.ops import (
    hedgehog_attention,
    hedgehog_weights,
    hedgehog_window_attention,
    hedgehog_window_weights,
    softmax_attention,
)
from regard.recipes.distil.losses import softmax_weights

WEIGHTS: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    hedgehog_attention: hedgehog_weights,
    hedgehog_window_attention: hedgehog_window_weights,
}
FORM = ("chunk_size", "impl")  # options of an op that do not change its weights


class Both(NamedTuple):
    """One layer's attention, twice: outputs [B, H, T, Dv], and weights [B, H, T, S] if asked for.

    query_mask: bool [B, T], False for a padded query; None: all are real.
    """

    teacher: Tensor
    student: Tensor
    teacher_weights: Tensor | None
    student_weights: Tensor | None
    query_mask: Tensor | None


def both(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    op: Callable[..., Tensor] = hedgehog_attention,
    operands: Mapping[str, Any] | None = None,
    teacher_options: Mapping[str, Any] | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    weights: bool = True,
) -> Both:
    """Softmax attention and `op` on the same q [B, H, T, D], k and v, the first without gradients.

    It needs nothing of the module around them, so it serves any layer that has q, k and v.

    Args:
        op: the student's, with its `operands` and options by name.
        teacher_options: of `softmax_attention`.
        weights: also the weights of both, T x S numbers per head; without them the student's
            output takes time and memory linear in T.
    """
    operands, options = dict(operands or {}), dict(teacher_options or {})
    masks = {"causal": causal, "key_mask": key_mask}
    with torch.no_grad():
        teacher = softmax_attention(q, k, v, **masks, **options)
    if not weights:
        student = op(q, k, v, **masks, **operands)
        return Both(teacher, student, None, None, query_mask)
    if set(options) - {"scale", "impl"}:
        accepted = "of scale only where weights are compared (weights=False compares outputs)"
        raise reject("both", "teacher_options", accepted, options)
    with torch.no_grad():
        of_teacher = softmax_weights(q, k, **masks, scale=options.get("scale"))
    shaping = {name: value for name, value in operands.items() if name not in FORM}
    of_student = WEIGHTS[op](q, k, **masks, **shaping)
    # A masked key may hold anything; its weight is 0, which would not stop NaN.
    values = v if key_mask is None else v.masked_fill(~key_mask[:, None, :, None], 0.0)
    values = values.to(of_student.dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
    return Both(teacher, (of_student @ values).to(q.dtype), of_teacher, of_student, query_mask)


@contextmanager
def transferring(
    model: nn.Module,
    observe: Callable[[str, Both], None],
    *,
    weights: bool = True,
    query_mask: Tensor | None = None,
) -> Iterator[dict[str, nn.Module]]:
    """Inside, converted layers of `model` hand on what the softmax layers they were would.

    Converted are those of `convert`, and layers of models of transformers and timm into which
    `regard.adapt` swapped "hedgehog" or "hedgehog_window"; the names are those of the layers.
    `observe(name, both)` is called for each one in each forward pass: layers learn on true
    inputs, independently of each other, and only one layer's weights need to be held. In
    self-attention a padded token is a padded query; `query_mask` says so of cross-attention.
    """
    layers: dict[str, nn.Module] = {**converted(model), **swapped(model)}
    if not layers:
        raise reject("transferring", "model", "one with converted layers (see `convert`)", model)
    with ExitStack() as installed:
        for name, layer in layers.items():
            installed.enter_context(_beside_its_teacher(name, layer, observe, weights, query_mask))
        yield layers


def converted(model: nn.Module) -> dict[str, Hedgehog]:
    """The layers of a model that have a teacher, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, Hedgehog)}
    return {name: layer for name, layer in found.items() if layer.teacher_options is not None}


def swapped(model: nn.Module) -> dict[str, nn.Module]:
    """What `regard.adapt` put into layers, where it has feature maps, by the layer's name."""
    found = {name: module for name, module in model.named_modules() if _maps(module) is not None}
    return {name.removesuffix(f".{ATTRIBUTE}"): module for name, module in found.items()}


def _maps(module: nn.Module) -> Learned | None:
    learned = (child for child in module.children() if isinstance(child, Learned))
    return next((child for child in learned if child.feature_map_q is not None), None)


@contextmanager
def _beside_its_teacher(
    name: str,
    layer: Any,
    observe: Callable[[str, Both], None],
    weights: bool,
    query_mask: Tensor | None,
) -> Iterator[None]:
    card, crossing = layer.card, getattr(layer, "kind", "self") == "cross"
    learned = _maps(layer)

    def look(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal crossing
        if learned is not None:
            return  # self- or cross-attention for good
        memory = arguments[1] if len(arguments) > 1 else named.get("memory")
        crossing = memory is not None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None, state: Any = None,
        return_state: bool = False, **operands: Any,
    ) -> Tensor:  # fmt: skip
        refused = {"state": state, "return_state": return_state or None, "cu_seqlens": cu_seqlens}
        for argument, value in refused.items():
            if value is not None:
                accepted = "left out during the transfer (use_cache=False)"
                raise reject("transferring", argument, accepted, value)
        real = query_mask if crossing else key_mask
        options = layer.teacher_options if learned is None else {"scale": learned.scale}
        found = both(
            q, k, v, op=card.op, operands=operands, teacher_options=options,
            causal=causal, key_mask=key_mask, query_mask=real, weights=weights,
        )  # fmt: skip
        observe(name, found)
        return found.teacher

    # What a swapped layer may give is read from the signature.
    attend.__signature__ = inspect.signature(card.op)  # pyright: ignore[reportFunctionMemberAccess]
    hook = layer.register_forward_pre_hook(look, with_kwargs=True)
    layer.card = replace(card, op=attend)
    try:
        yield
    finally:
        layer.card = card
        hook.remove()
