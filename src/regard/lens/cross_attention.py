"""Cross-attention of an encoder-decoder model: its maps, their means, and the times they tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.core.checks import check_number, reject
from regard.lens.inputs import array, tensor
from regard.lens.tap import Attention, points, tap


def cross_attention_maps(
    model: nn.Module, inputs: Tensor, tokens: Int[Tensor, "1 I"]
) -> Float[Tensor, "L H I S"]:
    """The cross-attention of one input over the encoder's output, every layer and head.

    model: an encoder-decoder of transformers (Whisper, Speech2Text, Moonshine, BART, T5, ...).
    inputs: its main input, [1, ...]. tokens: the decoder's input ids; forced decoding, so take the
    model's own hypothesis with the start token before it. Row i belongs to the token that is
    predicted *after* position i. Rows sum to 1.

    The model runs once and is left as it was.

    Raises:
        ValueError: more than one input, or a model without cross-attention.
    """
    return cross_attention(model, inputs, tokens)[0]


def cross_attention(
    model: nn.Module, inputs: Tensor, tokens: Int[Tensor, "1 I"]
) -> tuple[Float[Tensor, "L H I S"], Float[Tensor, "L H S D"]]:
    """The weights of `cross_attention_maps`, and the values that they fetch (`value_weighted`)."""
    operation = "cross_attention_maps"
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
    return torch.cat(maps), torch.cat(values)


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
        _check_numbers(operation, "pairs", [layer for layer, _ in pairs], sizes["layers"])
        _check_numbers(operation, "pairs", [head for _, head in pairs], sizes["heads"])
        return torch.stack([weights[layer, head] for layer, head in pairs]).mean(0)
    for name, chosen in (("layers", layers), ("heads", heads)):
        if chosen is not None:
            _check_numbers(operation, name, chosen, sizes[name])
    weights = weights if layers is None else weights[list(layers)]
    weights = weights if heads is None else weights[:, list(heads)]
    return weights.mean((0, 1))


def _check_numbers(operation: str, name: str, chosen: Sequence[int], size: int) -> None:
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


def alignment_matrix(
    attention: Float[Tensor, "L H I S"],
    pairs: Sequence[tuple[int, int]],
    *,
    frames: int | None = None,
    smooth: int = 7,
) -> Float[Tensor, "I S"]:
    """What chosen heads say together about where each token is.

    Each head's weights are standardised per frame over the tokens (frames that every token looks
    at tell nothing), smoothed by a running median of `smooth` frames, and averaged. frames: how
    many belong to the recording; the rest, which is padding, is cut off first.
    """
    operation = "alignment_matrix"
    weights = tensor(operation, "attention", attention, axes=4)
    _check_numbers(operation, "pairs", [layer for layer, _ in pairs], weights.shape[0])
    _check_numbers(operation, "pairs", [head for _, head in pairs], weights.shape[1])
    if smooth < 1 or smooth % 2 == 0:
        raise reject(operation, "smooth", "an odd number of frames", smooth)
    chosen = torch.stack([weights[layer, head] for layer, head in pairs])[..., :frames]
    deviation = chosen.std(1, correction=0, keepdim=True).clamp(min=1e-12)
    standard = (chosen - chosen.mean(1, keepdim=True)) / deviation
    edge = smooth // 2
    if edge and standard.shape[-1] > edge:
        padded = torch.nn.functional.pad(standard, (edge, edge), mode="reflect")
        standard = padded.unfold(-1, smooth, 1).median(-1).values
    return standard.mean(0)


def token_frames(matrix: Float[Tensor, "I S"]) -> np.ndarray:
    """The first and last frame of every token on the best monotone path [I, 2] (int).

    Dynamic time warping: from the first token and frame to the last of both, by steps of one
    token, one frame or both, with the largest sum of `matrix`.

    >>> token_frames(torch.tensor([[9.0, 9, 0, 0, 0], [0, 0, 9, 9, 9]])).tolist()
    [[0, 1], [2, 4]]
    """
    cost = -array(tensor("token_frames", "matrix", matrix, axes=2)).astype(np.float64)
    tokens, frames = cost.shape
    if not tokens or not frames:
        raise reject("token_frames", "matrix", "a matrix that is not empty", matrix)
    total = np.full((tokens + 1, frames + 1), np.inf)
    total[0, 0] = 0
    came = np.zeros((tokens, frames), dtype=np.int8)
    for i in range(tokens):
        for j in range(frames):
            options = (total[i, j], total[i + 1, j], total[i, j + 1])  # both, frame, token
            came[i, j] = int(np.argmin(options))
            total[i + 1, j + 1] = cost[i, j] + options[came[i, j]]
    found = np.full((tokens, 2), -1)
    i, j = tokens - 1, frames - 1
    while i >= 0 and j >= 0:
        found[i, 0] = j
        found[i, 1] = max(found[i, 1], j)
        step = came[i, j]
        i, j = i - (step != 1), j - (step != 2)
    return found


def word_spans(
    pieces: Sequence[str], frames: np.ndarray, *, seconds_per_frame: float
) -> list[tuple[str, float, float]]:
    """Joins tokens to words: (word, start, end) in seconds.

    pieces: the text of every token, where a word starts with a space. frames: from `token_frames`.
    """
    operation = "word_spans"
    check_number(operation, "seconds_per_frame", seconds_per_frame, above=0.0)
    if len(pieces) != len(frames):
        raise reject(operation, "frames", f"a row for each of {len(pieces)} pieces", frames)
    words: list[tuple[str, float, float]] = []
    for piece, (first, last) in zip(pieces, frames, strict=True):
        start, end = float(first) * seconds_per_frame, float(last + 1) * seconds_per_frame
        if words and not piece.startswith(" "):
            text, begun, _ = words[-1]
            words[-1] = (text + piece, begun, end)
        else:
            words.append((piece.strip(), start, end))
    return words
