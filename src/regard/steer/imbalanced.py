"""Keep a vision-language model looking at its image: raise the scores of chosen image tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.lens.tap import Attention, Edit, Point, points, tap
from regard.steer.context import Steering, for_keys, watching
from regard.steer.images import ImagePlaces
from regard.steer.sensitivity import language_part


class TokenSets(NamedTuple):
    """Patches of every image: `top` by local attention, `bottom` by summary; disjoint, [B, n]."""

    top: Bool[Tensor, "b n"]
    bottom: Bool[Tensor, "b n"]
    outlier_ratio: Float[Tensor, " b"]


def select_visual_tokens(
    first: Float[Tensor, "b h t t"],
    penultimate: Float[Tensor, "b h t t"],
    *,
    local_ratio: float = 0.25,
    summary: Literal["iqr"] | int = "iqr",
    spatial_ratio: float = 0.0,
    class_token: bool = True,
) -> TokenSets:
    """Which patches matter, from two attention maps of the vision tower.

    Local: the floor(local_ratio n) patches with most attention from the class token in the first
    layer. Summary: those with most in the last layer but one, as many as exceed
    Q3 + 1.5 (Q3 - Q1) there ("iqr"), or a given number. A patch in both belongs to the summary.

    Args:
        first, penultimate: weights [B, H, 1 + n, 1 + n], class token first: of a list of the
            layers' attentions, [0] and [-2].
        spatial_ratio: also take the floor(spatial_ratio n) patches that get most attention from
            all tokens in the first layer (the released code sums over the wrong axis, which ranks
            rounding noise; its default is 0).
        class_token: False for towers without one: means over all queries stand for its row.

    Matched to the released code's sets exactly; indices count from the first patch.
    Raises: ValueError for shares outside [0, 1], or a `summary` that is neither.
    """
    if not 0 <= local_ratio <= 1 or not 0 <= spatial_ratio <= 1:
        raise ValueError(
            f"select_visual_tokens: local_ratio {local_ratio}, spatial_ratio {spatial_ratio}: "
            "must be in [0, 1]"
        )
    local, wide = _from_class(first, class_token), _from_class(penultimate, class_token)
    n = local.shape[1]
    top = _most(local, [math.floor(n * local_ratio)] * len(local))
    if spatial_ratio:
        skip = int(class_token)
        received = first.sum(1).sum(1)[:, skip:]
        top = top | _most(received, [math.floor(n * spatial_ratio)] * len(local))
    if local.shape != wide.shape:
        raise ValueError(
            f"select_visual_tokens: first {list(first.shape)}, penultimate "
            f"{list(penultimate.shape)}: must be maps of the same images"
        )
    if summary == "iqr":
        low, high = torch.quantile(wide.double(), wide.new_tensor([0.25, 0.75]).double(), dim=1)
        counts = (wide > (high + 1.5 * (high - low))[:, None]).sum(1)
    elif type(summary) is int and 0 <= summary <= n:
        counts = torch.full((len(wide),), summary)
    else:
        raise ValueError(
            f"select_visual_tokens: summary {summary!r}: must be 'iqr' or a number up to {n}"
        )
    bottom = _most(wide, counts.tolist())
    return TokenSets(top & ~bottom, bottom, counts.to(local.dtype) / n)


def boost_scores(
    scores: Float[Tensor, "b h t s"],
    top: Bool[Tensor, "b s"],
    bottom: Bool[Tensor, "b s"],
    alpha: float = 0.7,
    beta: float = 0.3,
    head_gain: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h t s"]:
    """Raise the scores of chosen keys: z <- z + a |z|, a = alpha on top and beta on bottom.

    Keys in both count as bottom. Masked scores (the dtype's least, or -inf) stay as they are.
    head_gain multiplies alpha and beta head by head; 0 leaves a head alone. Note what |z| means:
    a positive score grows by 1 + a, a negative one shrinks to 1 - a of it, so that both rise.

    >>> z = torch.tensor([2.0, -2.0, 1.0]).view(1, 1, 1, 3)
    >>> boost_scores(z, torch.tensor([[True, True, False]]), torch.zeros(1, 3).bool(), alpha=0.5)
    tensor([[[[ 3., -1.,  1.]]]])
    """
    amount = alpha * (top & ~bottom).to(scores.dtype) + beta * bottom.to(scores.dtype)
    amount = amount[:, None, None, :]
    if head_gain is not None:
        amount = amount * head_gain.to(scores.dtype)[:, None, None]
    seen = scores > torch.finfo(scores.dtype).min / 2
    return torch.where(seen, scores + amount * scores.abs(), scores)


class visual_boost(Steering):  # noqa: N801 (a context manager, used as a function)
    """Raises the scores of image tokens for the token being generated, while it is open.

    Arif et al., "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large
    Vision-Language Model" (arXiv 2501.12206, 2025), and, with mode="pai", the uniform boost it
    builds on (Liu et al., arXiv 2407.21771). Matched to the released code's attention to 1e-5.

    In the chosen layers the last query's scores become `boost_scores` of the image's keys, the
    sets coming from `select_visual_tokens` on the vision tower's attention as the prompt runs.
    Every row of a batch has its own image and sets (the released code uses the first image's for
    all); rows and prompts without an image are left alone.

    Args:
        model: of transformers, with image tokens in its prompt.
        alpha, beta: as in `boost_scores`; both 0 change nothing, bit for bit.
        layers: layers of the language model; None: all from the third on.
        mode: "dual" (both sets) or "pai" (all image tokens by alpha).
        head_gain: [H], or [L, H] with a row for every layer of the model; see `head_gains`.
        image: bool [B, T], the prompt's image tokens; None: from input_ids and the config.
        tokens: (top, bottom), bool [B, n] each, over the image's tokens; None: from the tower.
        local_ratio, summary, spatial_ratio, class_token: as in `select_visual_tokens`.
        vision: substring of the vision tower's module paths.
        where: substring of the language model's; None: "language_model" where there is one.

    Cost: one row of scores per layer and token; all other rows come from the model's own kernel.
    Limits: prompts are padded on the left, as for any generation.
    Raises: ValueError for layers that are not there, no image token, no vision tower, padding on
        the right, an image after the prompt, or image tokens that are not as many as the tower's
        patches.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 0.7,
        beta: float = 0.3,
        layers: Sequence[int] | None = None,
        mode: Literal["dual", "pai"] = "dual",
        head_gain: Tensor | None = None,
        image: Bool[Tensor, "b t"] | None = None,
        tokens: tuple[Tensor, Tensor] | None = None,
        local_ratio: float = 0.25,
        summary: Literal["iqr"] | int = "iqr",
        spatial_ratio: float = 0.0,
        class_token: bool = True,
        vision: str = "vision",
        where: str | None = None,
    ) -> None:
        if mode not in ("dual", "pai"):
            raise ValueError(f"visual_boost: mode {mode!r}: must be 'dual' or 'pai'")
        if alpha < 0 or beta < 0:
            raise ValueError(f"visual_boost: alpha {alpha}, beta {beta}: must not be negative")
        self.model, self.alpha, self.beta, self.mode = model, alpha, beta, mode
        self.head_gain, self.tokens = head_gain, tokens
        self.options: dict[str, Any] = {
            "local_ratio": local_ratio,
            "summary": summary,
            "spatial_ratio": spatial_ratio,
            "class_token": class_token,
        }
        self.places = ImagePlaces(model, image, "visual_boost")
        where = language_part(model, where)
        own = [p for p in points(model) if p.kind == "self" and (where is None or where in p.name)]
        there = sorted({point.layer for point in own})
        chosen = [n for n in there if n >= 2] if layers is None else list(layers)
        if not chosen:
            raise ValueError(
                f"visual_boost: layers: none to change; the language model has {there}"
            )
        _check_gain(head_gain, own, chosen)
        edit = Edit(pre=self._boost, queries=slice(-1, None))
        self._taps = [tap(model, edit=edit, layers=chosen, kind="self", where=where)]
        self._tower: list[int] = []
        if mode == "dual" and tokens is None:
            tower = sorted(
                {p.layer for p in points(model) if p.kind == "self" and vision in p.name}
            )
            if len(tower) < 2:
                raise ValueError(
                    f"visual_boost: vision {vision!r}: no vision tower with two layers or more is "
                    "found under that path; give `tokens`, or mode='pai'"
                )
            self._tower = [tower[0], tower[-2]]
            self._taps.append(tap(model, read=self._look, layers=self._tower, where=vision))
        self._maps: dict[int, Tensor] = {}  # of the tower, until the language model asks
        self._marks: tuple[Tensor, Tensor] | None = None  # of the images' patches
        self._ids: Tensor | None = None  # of this call,
        self._prompt: Tensor | None = None  # and of the prompt that the marks belong to
        self._sets: tuple[Tensor, Tensor] | None = None  # of the prompt: [B, T] each
        self._image: Tensor | None = None  # what the prompt's image tokens were found in
        self._lowest = min(chosen)
        self._paused = False

    def start(self) -> None:
        self._maps, self._marks, self._prompt = {}, None, None
        self._sets, self._image = None, None

    def parts(self) -> list[AbstractContextManager[Any]]:
        return [*self._taps, watching(self.model, self._watch)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model is itself again: for a run beside the generation (`text_contrast`)."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _watch(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._paused:
            self.places.watch(module, args, kwargs)
            self._ids = args[0] if args else kwargs.get("input_ids")

    def _look(self, attention: Attention) -> None:
        if not self._paused:
            whole = self.options["spatial_ratio"] or not self.options["class_token"]
            rows = None if whole else range(1)
            self._maps[attention.layer] = attention.weights_of(rows=rows).detach()

    def _boost(self, scores: Tensor, attention: Attention) -> Tensor | None:
        if self._paused or (self.alpha == 0 and self.beta == 0):
            return None
        if attention.layer == self._lowest:
            mask = self.places.mask
            if attention.offset == 0:
                self._sets, self._image = self._find(attention), mask
            elif mask is not None and mask is not self._image and bool(mask.any()):
                raise ValueError("visual_boost: an image after the prompt; run all of it at once")
        if self._sets is None:
            raise ValueError("visual_boost: a cache whose prompt was run outside; run it inside")
        top, bottom = (for_keys(marks, attention) for marks in self._sets)
        gain = self.head_gain
        if gain is not None and gain.ndim == 2:
            gain = gain[attention.layer]
        return boost_scores(scores, top, bottom, self.alpha, self.beta, gain)

    def _find(self, attention: Attention) -> tuple[Tensor, Tensor]:
        B, _, T, _ = attention.q.shape
        image = self.places.prompt(T, B).to(attention.q.device)
        if not bool(attention.query_mask[:, -1].all()):
            raise ValueError("visual_boost: a prompt padded on the right; pad on the left")
        if self.mode == "pai" or not bool(image.any()):
            return image, torch.zeros_like(image)
        top, bottom = self._of_tower() if self.tokens is None else self.tokens
        return _place(image, top), _place(image, bottom)

    def _of_tower(self) -> tuple[Tensor, Tensor]:
        """The sets of the tower's last run, which was for this prompt or the beginning of it."""
        if all(layer in self._maps for layer in self._tower):
            first, late = (self._maps.pop(layer) for layer in self._tower)
            found = select_visual_tokens(first, late, **self.options)
            self._marks, self._prompt = (found.top, found.bottom), self._ids
        elif self._marks is None or not _extends(self._ids, self._prompt):
            raise ValueError(
                f"visual_boost: vision {self._tower}: these layers of the vision tower did not "
                "run with the prompt; give `tokens`"
            )
        return self._marks


def _extends(ids: Tensor | None, prompt: Tensor | None) -> bool:
    """Whether the tokens are a prompt and something after it, as in generation without a cache."""
    if ids is None or prompt is None or len(ids) != len(prompt):
        return False
    n = prompt.shape[1]
    return ids.shape[1] > n and torch.equal(ids[:, :n], prompt)


def _check_gain(gain: Tensor | None, own: Sequence[Point], chosen: Sequence[int]) -> None:
    if gain is None:
        return
    for point in own:
        rows = 1 + max(other.layer for other in own)
        fits = gain.shape in ((point.heads,), (rows, point.heads))
        if point.layer in chosen and point.heads is not None and not fits:
            raise ValueError(
                f"visual_boost: head_gain of shape {list(gain.shape)}: must be [{point.heads}] or "
                f"[{rows}, {point.heads}]: {point.name} has {point.heads} heads"
            )


def _place(image: Bool[Tensor, "b t"], marks: Bool[Tensor, "m n"]) -> Bool[Tensor, "b t"]:
    """Marks of the images' patches, at the places of the image tokens, in their order.

    Rows of a batch may have become several beams each, while images and marks have not.
    """
    beams = int(image.sum()) // max(marks.numel(), 1)
    firsts = image[:: max(beams, 1)]
    if int(firsts.sum()) != marks.numel() or not torch.equal(
        firsts.repeat_interleave(max(beams, 1), 0), image
    ):
        raise ValueError(
            f"visual_boost: tokens: prompts have {image.sum(1).tolist()} image tokens, and the "
            f"sets are of {marks.shape[0]} images with {marks.shape[1]} patches"
        )
    placed = torch.zeros_like(firsts)
    placed[firsts] = marks.to(image.device).flatten()
    return placed.repeat_interleave(max(beams, 1), 0)


def _from_class(weights: Tensor, class_token: bool) -> Float[Tensor, "b n"]:
    if class_token:
        return weights[:, :, 0, 1:].sum(1)
    return weights.sum(1).mean(1)


def _most(values: Float[Tensor, "b n"], counts: Sequence[int]) -> Bool[Tensor, "b n"]:
    order = torch.sort(values, stable=True, dim=-1, descending=True).indices
    rank = order.argsort(-1)
    return rank < torch.tensor(counts, device=values.device)[:, None]
