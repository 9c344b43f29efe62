"""Cross-attention of an encoder-decoder model: its maps, their means, its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.core.checks import reject
from regard.lens.inputs import array, tensor
from regard.lens.maps import draw_heads
from regard.lens.records import Record
from regard.lens.tap import Attention, points, tap


@dataclass(frozen=True)
class CrossAttention(Record):
    """What a decoder looks at: weights [L, H, I, S], and values [L, H, S, D] that they fetch.

    layers: the numbers of the decoder's layers.
    """

    weights: np.ndarray
    values: np.ndarray
    layers: tuple[int, ...]

    def picture(self, path: Any) -> None:
        """A row per layer, a column per head; tokens downwards, the encoder's output across."""
        draw_heads(self.weights, self.layers, path)


def cross_attention(model: nn.Module, inputs: Tensor, tokens: Int[Tensor, "1 I"]) -> CrossAttention:
    """The cross-attention of one input over the encoder's output, every layer and head.

    model: an encoder-decoder of transformers (Whisper, Speech2Text, Moonshine, BART, T5, ...).
    inputs: its main input, [1, ...]. tokens: the decoder's input ids; forced decoding, so take the
    model's own hypothesis with the start token before it. Row i belongs to the token that is
    predicted *after* position i. Rows sum to 1.

    The model runs once, without gradients, and is left as it was.

    Raises:
        ValueError: more than one input, or a model without cross-attention.
    """
    operation = "cross_attention"
    if len(inputs) != 1 or tokens.shape[:1] != (1,):
        raise reject(operation, "inputs and tokens", "one sequence each", inputs)
    if not any(point.kind == "cross" for point in points(model)):
        raise reject(operation, "model", "an encoder-decoder with cross-attention", type(model))
    maps: list[Tensor] = []
    values: list[Tensor] = []

    def read(attention: Attention) -> None:
        maps.append(attention.weights.detach().clone())
        group = attention.q.shape[1] // attention.v.shape[1]
        values.append(attention.v.detach().repeat_interleave(group, 1))

    given: dict[str, Any] = {getattr(model, "main_input_name", "input_ids"): inputs}
    with tap(model, read=read, kind="cross"), torch.no_grad():
        model(**given, decoder_input_ids=tokens, use_cache=False)
    weights, fetched = array(torch.cat(maps)), array(torch.cat(values))
    return CrossAttention(weights, fetched, tuple(range(len(maps))))


def cross_attention_maps(
    model: nn.Module, inputs: Tensor, tokens: Int[Tensor, "1 I"]
) -> Float[Tensor, "L H I S"]:
    """The weights of `cross_attention` as a tensor, for `aggregate` and `agreement`."""
    return torch.from_numpy(cross_attention(model, inputs, tokens).weights)


def aggregate(
    attention: Float[Tensor, "L H I S"],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Float[Tensor, "I S"]:
    """The mean over chosen layers and heads, or over `pairs` of (layer, head); rows still sum to 1.

    Raises:
        ValueError: a layer or head that is not there, none at all, or pairs beside the others.
    """
    operation = "aggregate"
    weights = tensor(operation, "attention", attention, axes=4)
    sizes = {"layers": weights.shape[0], "heads": weights.shape[1]}
    if pairs is not None:
        if layers is not None or heads is not None:
            raise reject(operation, "pairs", "None beside layers or heads", pairs)
        check_numbers(operation, "pairs", [layer for layer, _ in pairs], sizes["layers"])
        check_numbers(operation, "pairs", [head for _, head in pairs], sizes["heads"])
        return torch.stack([weights[layer, head] for layer, head in pairs]).mean(0)
    for name, chosen in (("layers", layers), ("heads", heads)):
        if chosen is not None:
            check_numbers(operation, name, chosen, sizes[name])
    weights = weights if layers is None else weights[list(layers)]
    weights = weights if heads is None else weights[:, list(heads)]
    return weights.mean((0, 1))


def check_numbers(operation: str, name: str, chosen: Sequence[int], size: int) -> None:
    """ValueError for a number that is not there, or for none."""
    if not len(chosen) or not all(0 <= number < size for number in chosen):
        raise reject(operation, name, f"numbers from 0 to {size - 1}, at least one", chosen)


def value_weighted(
    attention: Float[Tensor, "L H I S"], values: Float[Tensor, "L H S D"]
) -> Float[Tensor, "L H I S"]:
    """Attention times the length of the value that it fetches, rows scaled to sum to 1.

    A weight says little where the value behind it is short. Rows without any mass stay 0.
    """
    operation = "value_weighted"
    weights = tensor(operation, "attention", attention, axes=4)
    fetched = tensor(operation, "values", values, axes=4)
    if fetched.shape[:3] != (*weights.shape[:2], weights.shape[3]):
        raise reject(operation, "values", "[L, H, S, D] of the attention [L, H, I, S]", fetched)
    found = weights * fetched.norm(dim=-1)[:, :, None]
    total = found.sum(-1, keepdim=True)
    return torch.where(total > 0, found / total, 0.0)
