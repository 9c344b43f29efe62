"""When words were spoken: the times that cross-attention of a speech model tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.core.checks import check_number, reject
from regard.lens.cross_attention import check_numbers
from regard.lens.inputs import array, tensor
from regard.lens.records import Record, drawing


@dataclass(frozen=True)
class WordTimes(Record):
    """Words and when they were spoken, in seconds.

    words: as written by the model; start, end: [W]; matrix: [I, S], what the heads say of every
    token (`alignment_matrix`); frames: [I, 2], first and last frame of every token on its path.
    """

    words: tuple[str, ...]
    start: np.ndarray
    end: np.ndarray
    matrix: np.ndarray
    frames: np.ndarray
    seconds_per_frame: float

    def picture(self, path: Any) -> None:
        """The matrix with the path through it, and the words above their times."""
        tokens, frames = self.matrix.shape
        seconds = frames * self.seconds_per_frame
        with drawing(path, (10, 1.5 + 0.16 * tokens)) as axes:
            axis = axes[0, 0]
            extent = (0, seconds, tokens - 0.5, -0.5)
            axis.imshow(self.matrix, aspect="auto", extent=extent, vmin=-1, vmax=5)
            for row, (first, last) in enumerate(self.frames):
                span = np.array([first, last + 1]) * self.seconds_per_frame
                axis.plot(span, [row, row], color="white", linewidth=1.5)
            for word, start in zip(self.words, self.start, strict=True):
                axis.text(start, -0.8, word, rotation=60, ha="left", va="bottom", fontsize=7)
            axis.set(xlabel="seconds", ylabel="token")


def word_times(
    attention: Float[Tensor, "L H I S"],
    pieces: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    *,
    seconds_per_frame: float,
    frames: int | None = None,
    smooth: int = 7,
) -> WordTimes:
    """The times of the words of a transcript, from heads that follow the audio.

    `alignment_matrix`, the best monotone path through it (`token_frames`), and tokens joined to
    words (`word_spans`).

    attention: of the rows that predict `pieces`, and one more for the end of the text, which may
    be missing. pieces: the text of every token. pairs: (layer, head) of the heads that align; for
    Whisper they are published. seconds_per_frame: of the encoder's output, 0.02 for Whisper.
    frames, smooth: as for `alignment_matrix`.

    Raises:
        ValueError: fewer rows of attention than pieces, or more than one row more.
    """
    operation = "word_times"
    weights = tensor(operation, "attention", attention, axes=4)
    count = len(pieces)
    if not count or weights.shape[2] not in (count, count + 1):
        wanted = f"[L, H, {count} or {count + 1}, S] for the pieces, of which there must be one"
        raise reject(operation, "attention", wanted, weights)
    matrix = alignment_matrix(weights, pairs, frames=frames, smooth=smooth)
    spans = token_frames(matrix)[:count]
    words = word_spans(pieces, spans, seconds_per_frame=seconds_per_frame)
    return WordTimes(
        words=tuple(word for word, _, _ in words),
        start=np.array([start for _, start, _ in words]),
        end=np.array([end for _, _, end in words]),
        matrix=array(matrix[:count]),
        frames=spans,
        seconds_per_frame=seconds_per_frame,
    )


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
    check_numbers(operation, "pairs", [layer for layer, _ in pairs], weights.shape[0])
    check_numbers(operation, "pairs", [head for _, head in pairs], weights.shape[1])
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


def token_frames(matrix: Float[Tensor, "I S"]) -> Int[np.ndarray, "I 2"]:
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
