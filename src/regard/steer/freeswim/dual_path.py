"""Windows for detail beside full attention for composition, in a model trained on small videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from regard.core.checks import check_flag, check_integer, check_number, reject, words
from regard.ops.softmax import softmax_attention
from regard.ops.window import inward_window_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attends(Protocol):
    """An attention layer whose arithmetic is a function that can be replaced.

    attend(q, k, v): q [B, H, T, D], k and v [B, H, S, D] -> [B, H, T, D], before the output
    projection.
    """

    attend: Any


class Layer(NamedTuple):
    """The two attentions of a block."""

    self_attention: Attends
    cross_attention: Attends


class DualPath:
    """FreeSwim: self-attention in windows of the size of training, composed by full attention.

    A batch holds every latent twice, first all for the window path, then all for the full path:

        o_window = inward windows(q, k, v),   o_full = softmax attention(q, k, v),
        both with the scale of `entropy_scale`; and in cross-attention, for both paths,
        c = softmax attention(q_full, k_text, v_text)

    The window path is what counts: after a step its latent goes on, and the full path starts from
    it again. With `refresh_every=n` the full path runs in every n-th step only: its c is kept,
    layer by layer, and used in the steps between, in which both paths are the window path; then
    passes without guidance (a negative prompt) never run it.

    Args:
        layers: the blocks' attentions (`Layer`, or pairs); or a model whose `blocks` have `attn1`
            and `attn2`, as `regard.models.wan.Wan` and diffusers name them.
        grid: tokens along time, height and width (or height and width).
        half: half sides of the window, of height and width; that of training // 2.
        scale: of self-attention in both paths; None is D ** -0.5.
        time_half: half a window along time, None: all frames.
        refresh_every: None: the full path runs in every pass.
        guided_steps: steps from this one on are the window path alone.

    Cost: per step 2 w T^2 + T^2 / refresh_every of self-attention instead of 2 T^2, w the share of
    a window in the grid.
    Source: FreeSwim, arXiv 2511.14712, 2025; matched to 1e-5 with the authors' processors in a
    tiny Wan model, with and without the cache.
    Raises: TypeError, ValueError naming the argument.

    >>> from regard.models.wan import Wan, WanConfig
    >>> model = Wan(WanConfig(heads=2, head_dim=12, layers=1, mlp_dim=8, channels=4,
    ...     channels_out=4, text_dim=10, freq_dim=16))
    >>> x, time, text = torch.randn(1, 4, 2, 12, 16), torch.tensor([500.0]), torch.randn(1, 3, 10)
    >>> dual = DualPath(model, model.grid(x), (1, 2), refresh_every=2)
    >>> with dual.at(step=0):
    ...     first = model(torch.cat([x, x]), time, text)[:1]
    >>> dual.paths(step=1)  # the cross-attention of step 0 is used again
    1
    >>> with dual.at(step=1):
    ...     second = model(first, time, text)
    """

    def __init__(
        self,
        layers: Sequence[tuple[Attends, Attends]] | nn.Module,
        grid: Sequence[int],
        half: int | Sequence[int],
        *,
        scale: float | None = None,
        time_half: int | None = None,
        refresh_every: int | None = None,
        guided_steps: int | None = None,
    ) -> None:
        op = type(self).__name__
        self.layers = tuple(Layer(*pair) for pair in _layers(op, layers))
        if len(grid) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in grid):
            raise reject(op, "grid", "two or three positive ints", tuple(grid))
        halves = [half] * 2 if isinstance(half, int) else list(half)
        if len(halves) != 2 or not all(isinstance(n, int) and n >= 0 for n in halves):
            raise reject(op, "half", "an int of at least 0, or two", half)
        for name, steps in (("refresh_every", refresh_every), ("guided_steps", guided_steps)):
            if steps is not None:
                check_integer(op, name, steps, least=1 if name == "refresh_every" else 0)
        if time_half is not None:
            if len(grid) == 2:
                raise reject(op, "time_half", "None for a grid without time", time_half)
            check_integer(op, "time_half", time_half, least=0)
        if scale is not None:
            check_number(op, "scale", scale)
        self.grid, self.half = tuple(grid), tuple(halves)
        self.scale, self.time_half = scale, time_half
        self.refresh_every, self.guided_steps = refresh_every, guided_steps
        self._kept: list[Tensor | None] = [None] * len(self.layers)

    def paths(self, step: int, conditional: bool = True) -> int:
        """2 where the batch of a pass must hold every latent twice, else 1.

        Where it is 1 twice will do too: both halves come out alike.
        """
        return 2 if self._mode(step, conditional) == "both" else 1

    def clear(self) -> None:
        """Forgets what was kept, for another video."""
        self._kept = [None] * len(self.layers)

    @contextmanager
    def at(self, step: int, conditional: bool = True) -> Iterator[DualPath]:
        """Inside, the model's attention is that of this step (0 is the first of a run).

        conditional: False in the pass of the negative prompt. The layers are as before
        afterwards, whatever happens.
        """
        mode = self._mode(step, conditional)
        if mode == "reuse" and None in self._kept:
            raise reject(
                "DualPath.at", "step", "behind one that refreshes the cross-attention", step
            )
        keep = mode == "both" and conditional and self.refresh_every is not None
        before = [
            (layer.self_attention.attend, layer.cross_attention.attend) for layer in self.layers
        ]
        try:
            for number, layer in enumerate(self.layers):
                layer.self_attention.attend = self._self(mode)
                layer.cross_attention.attend = self._cross(mode, number, keep)
            yield self
        finally:
            for layer, (own, cross) in zip(self.layers, before, strict=True):
                layer.self_attention.attend, layer.cross_attention.attend = own, cross

    def _mode(self, step: int, conditional: bool) -> str:
        """ "both" paths, "reuse" of what is kept, or the "window" path alone."""
        check_integer("DualPath", "step", step, least=0)
        check_flag("DualPath", "conditional", conditional)
        if self.guided_steps is not None and step >= self.guided_steps:
            return "window"
        if self.refresh_every is None:
            return "both"
        if not conditional:
            return "window"
        return "reuse" if step % self.refresh_every else "both"

    def _window(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return inward_window_attention(
            q, k, v, self.grid, self.half, time_half=self.time_half, scale=self.scale
        )

    def _self(self, mode: str) -> Attend:
        def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            n = _half_of(q)
            window = self._window(q[:n], k[:n], v[:n])
            return torch.cat([window, softmax_attention(q[n:], k[n:], v[n:], scale=self.scale)])

        return both if mode == "both" else self._window

    def _cross(self, mode: str, number: int, keep: bool) -> Attend:
        def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            n = _half_of(q)
            out = softmax_attention(q[n:], k[n:], v[n:])
            if keep:
                self._kept[number] = out.detach()
            return torch.cat([out, out])

        def reuse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept = self._kept[number]
            assert kept is not None
            copies, rest = divmod(len(q), len(kept))
            if rest or kept.shape[1:3] != q.shape[1:3]:
                accepted = f"as when it was kept, {list(kept.shape[:3])} once or twice"
                raise reject("DualPath", "batch", accepted, words(f"{list(q.shape[:3])}"))
            return kept.repeat(copies, 1, 1, 1)

        return {"both": both, "reuse": reuse, "window": softmax_attention}[mode]


def _half_of(q: Tensor) -> int:
    if len(q) % 2:
        accepted = "every latent twice, those of the window path first"
        raise reject("DualPath", "batch", accepted, words(f"{len(q)} of them"))
    return len(q) // 2


def _layers(op: str, layers: Any) -> Sequence[tuple[Attends, Attends]]:
    if isinstance(layers, nn.Module):
        try:
            layers = [(block.attn1, block.attn2) for block in layers.blocks]  # pyright: ignore
        except (AttributeError, TypeError):
            accepted = "pairs of attention layers, or a model whose blocks have attn1 and attn2"
            raise reject(op, "layers", accepted, words(type(layers).__name__)) from None
    pairs = list(layers)
    fits = all(
        isinstance(pair, tuple) and len(pair) == 2 and all(hasattr(x, "attend") for x in pair)
        for pair in pairs
    )
    if not pairs or not fits:
        raise reject(op, "layers", "pairs of layers with an `attend`", layers)
    return pairs
