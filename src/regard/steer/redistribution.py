"""Visual attention redistribution: move attention from visual sinks to the rest of the image."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.lens.sinks import Columns
from regard.lens.sinks import sink_dimensions as massive_dimensions
from regard.lens.tap import Attention, Edit, points, tap
from regard.steer.context import Steering, for_keys, watching
from regard.steer.images import ImagePlaces

SHARE_EPSILON = 1e-6  # per image token, in the share of the sinks: part of the published rule
LLAMA2_7B_DIMENSIONS = (1415, 2533)
LLAMA2_13B_DIMENSIONS = (2100, 4743)


def sink_score(hidden: Float[Tensor, "*b c"], dims: Sequence[int]) -> Float[Tensor, "*b"]:
    """How massive a token is: max over d in dims of |x_d| / sqrt(mean x² + 1e-6), in float32."""
    C = hidden.shape[-1]
    if not len(dims) or any(not 0 <= d < C for d in dims):
        raise ValueError(f"sink_score: dims {list(dims)}: must be some of 0 to {C - 1}")
    x = hidden.float()
    size = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return (x[..., list(dims)] * size).abs().amax(-1)


def image_centric_heads(
    weights: Float[Tensor, "b h t s"],
    sinks: Bool[Tensor, "b s"],
    image: Bool[Tensor, "b s"],
    rho: float = 0.5,
    min_mass: float = 0.2,
) -> Bool[Tensor, "b h t"]:
    """Rows that look at the image and not only at its sinks.

        Σ_image w >= min_mass   and   Σ_visual sinks w / Σ_image (w + 1e-6) <= rho

    Rows of a sample without a visual sink are never selected. (The paper's rho is the share of
    what is no sink, 1 - rho here.)
    """
    visual = (sinks & image)[:, None, None, :]
    on_image = weights * image[:, None, None, :]
    total = on_image.sum(-1)
    count = image.sum(-1)[:, None, None]
    share = (weights * visual).sum(-1) / (total + SHARE_EPSILON * count)
    return (total >= min_mass) & (share <= rho) & visual.any(-1)


def redistribute(
    weights: Float[Tensor, "b h t s"],
    sinks: Bool[Tensor, "b s"],
    image: Bool[Tensor, "b s"],
    selected: Bool[Tensor, "b h t"],
    keep: float = 0.6,
) -> Float[Tensor, "b h t s"]:
    """In selected rows, sinks keep a share and the rest goes to the image's other tokens.

        w'_j = keep w_j for sinks (of text and image);   w'_j = w_j (1 + omega / r) for the
        image's other tokens,   omega = (1 - keep) Σ_sinks w,   r = Σ_image's other tokens w

    Rows keep their sums; a row without weight on the image's other tokens stays as it is.
    """
    sink = sinks[:, None, None, :]
    other = (image & ~sinks)[:, None, None, :]
    omega = (1 - keep) * (weights * sink).sum(-1, keepdim=True)
    room = (weights * other).sum(-1, keepdim=True)
    chosen = selected[..., None] & (room > 0)
    factor = omega / torch.where(room > 0, room, 1.0)
    new = torch.where(sink, keep * weights, torch.where(other, weights * (1 + factor), weights))
    return torch.where(chosen, new, weights)


def redistribute_output(
    output: Float[Tensor, "*b t dv"],
    sink_weights: Float[Tensor, "*b t j"],
    sink_values: Float[Tensor, "*b j dv"],
    image_weights: Float[Tensor, "*b t n"],
    image_values: Float[Tensor, "*b n dv"],
    keep: float = 0.6,
) -> Float[Tensor, "*b t dv"]:
    """The same from partial sums: o' = o - (1 - keep) o_sinks + factor o_image.

    `image_*` are the image's tokens that are no sinks. Costs O(T (j + n) Dv).
    """
    room = image_weights.sum(-1, keepdim=True)
    omega = (1 - keep) * sink_weights.sum(-1, keepdim=True)
    factor = omega / torch.where(room > 0, room, 1.0)
    new = output - (1 - keep) * (sink_weights @ sink_values)
    new = new + factor * (image_weights @ image_values)
    return torch.where(room > 0, new, output)


class NoMassiveDimension(ValueError):
    """No hidden dimension of the first token stands out."""


def sink_dimensions(
    model: nn.Module,
    *args: Any,
    most: int = 4,
    times: float = 10.0,
    where: str | None = None,
    **inputs: Any,
) -> tuple[int, ...]:
    """Hidden dimensions in which a prompt's first token is massive, found by running the model.

    A dimension counts where, at the first real token and in the middle of the stack (from the
    fourth layer to the last but one, where there are so many), |x_d| / rms(x) is among the `most`
    largest and above `times` its median, in more than half of these layers and of the rows.

    Raises: NoMassiveDimension, a ValueError, where there is none; ValueError where the model's
    layers do not show their input.
    """
    firsts: list[Tensor] = []
    layers = sorted({p.layer for p in _text_points(model, where)})
    middle = set(layers[3:-1] or layers[-1:])

    def look(attention: Attention) -> None:
        if attention.layer in middle and attention.hidden is not None and not attention.offset:
            first = attention.query_mask.int().argmax(1)
            firsts.append(attention.hidden[torch.arange(len(first)), first].detach()[:, None])

    with torch.no_grad(), tap(model, read=look, where=_text(model, where), kind="self"):
        model(*args, **inputs)
    if not firsts:
        raise ValueError("sink_dimensions: model: its layers do not show what enters them")
    found = sorted(massive_dimensions(torch.stack(firsts), most=most, ratio=times))
    if not found:
        raise NoMassiveDimension(
            "sink_dimensions: no dimension of the first token stands out; sinks can be told by "
            "their attention instead (dims='attention')"
        )
    return tuple(found)


class visual_attention_redistribution(Steering):  # noqa: N801 (a context manager, used as a function)
    """Recycles the attention that visual sinks draw, while it is open (VAR).

    Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models"
    (arXiv 2503.03321, ICLR 2025). Matched to the released code's sets exactly, weights to 1e-6,
    logits at the prompt and the next cached token to 1e-5 (with `skip_last=False`).

    Sinks of a layer are the prompt's tokens with sink_score(input of the layer) > tau. In layers
    with sinks in the image, rows that `image_centric_heads` selects are changed by
    `redistribute`: of the prompt those after the image's last token, later all. Sinks of the
    prompt hold for cached generation. Rows of a batch have their own images and sinks; padding on
    either side is allowed.

    Args:
        model: a decoder of transformers with image tokens in its prompt.
        dims: massive dimensions of the base model; "auto": found by one more run of the first
            prompt (see `sink_dimensions`); "attention": sinks are, instead, the tokens whose mean
            weight over heads and queries is above alpha / tokens, which "auto" falls back to.
        image: bool [B, T], the prompt's image tokens; None: from input_ids and the config.
        tau, rho, min_mass: as above and in `image_centric_heads`.
        keep: what sinks keep (the released code's p; the paper counts what is moved); 1 changes
            nothing, bit for bit.
        skip_layers: layers left alone.
        skip_last: leave the last layer alone, as the paper says (the released code does not).
        where: substring of the module paths; None: the language model's.
        prompt: how many of the first tokens (padding included) are the prompt, where later ones
            run with it, as in generation without a cache. None: all of them.
        alpha: see `dims`.

    Cost: explicit weights of all heads of these layers, in blocks of queries (twice with sinks told
    by attention): O(block S) memory.
    Raises: ValueError for values out of range, no image token, or layers that are not there.
    """

    def __init__(
        self,
        model: nn.Module,
        dims: Sequence[int] | str = "auto",
        *,
        image: Bool[Tensor, "b t"] | None = None,
        tau: float = 20.0,
        rho: float = 0.5,
        keep: float = 0.6,
        min_mass: float = 0.2,
        skip_layers: Collection[int] = (0, 1),
        skip_last: bool = True,
        where: str | None = None,
        prompt: int | None = None,
        alpha: float = 5.0,
    ) -> None:
        if not alpha > 0:
            raise ValueError(f"visual_attention_redistribution: alpha {alpha}: must be above 0")
        if prompt is not None and prompt < 1:
            raise ValueError(
                f"visual_attention_redistribution: prompt {prompt}: must be at least 1"
            )
        for name, value in (("rho", rho), ("keep", keep), ("min_mass", min_mass)):
            if not 0 <= value <= 1:
                raise ValueError(
                    f"visual_attention_redistribution: {name} {value}: must be in [0, 1]"
                )
        if dims not in ("auto", "attention") and (isinstance(dims, str) or not len(dims)):
            raise ValueError(
                f"visual_attention_redistribution: dims {dims!r}: must be numbers, 'auto' or "
                "'attention'"
            )
        self.model, self.tau, self.rho, self.keep = model, tau, rho, keep
        self.min_mass, self.where, self.prompt = min_mass, where, prompt
        self.alpha = alpha
        # None: not known yet; empty: sinks are told by their attention.
        self.dims: tuple[int, ...] | None = None
        self._finding = False
        if dims != "auto":
            self.dims = () if dims == "attention" else tuple(int(d) for d in dims)
        self.places = ImagePlaces(model, image, "visual_attention_redistribution")
        there = sorted({point.layer for point in _text_points(model, where)})
        skipped = set(skip_layers) | ({there[-1]} if skip_last and there else set())
        layers = [layer for layer in there if layer not in skipped]
        if there and not layers:
            raise ValueError(
                f"visual_attention_redistribution: skip_layers {sorted(skipped)}: no layer is left"
            )
        edit = Edit(post=self._redistribute, survey=self._look, by_rows=True)
        self._tap = tap(
            model, edit=edit, layers=layers or None, kind="self", where=_text(model, where)
        )
        self.sinks: dict[int, Tensor] = {}  # of the prompt, by layer: [B, T]
        self._image: Tensor | None = None

    def parts(self) -> list[AbstractContextManager[Any]]:
        """A look at the model's inputs, and the tap."""
        return [watching(self.model, self._watch), self._tap]

    def start(self) -> None:
        """Forget the last prompt; dimensions that were found stay."""
        self.sinks, self._image = {}, None

    def _watch(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.places.watch(module, args, kwargs)
        if self.dims is not None or self._finding or self.keep == 1:
            return
        plain = {k: v for k, v in kwargs.items() if "cache" not in k and "past" not in k}
        self._finding = True  # that run comes through here again, and is not steered
        try:
            self.dims = sink_dimensions(module, *args, where=self.where, use_cache=False, **plain)
        except NoMassiveDimension:
            self.dims = ()
        finally:
            self._finding = False

    def _look(self, blocks: Iterator[tuple[range, Tensor]], attention: Attention) -> None:
        if self.keep == 1 or self.dims is None:
            return
        B, _, T, _ = attention.q.shape
        if attention.offset == 0:
            real = attention.query_mask
            self._image = self.places.prompt(T, B) & real
            sinks = self._sinks(blocks, attention, real)
            if self.prompt is not None:
                sinks[:, self.prompt :] = False
            self.sinks[attention.layer] = sinks
        elif attention.layer not in self.sinks or self._image is None:
            raise ValueError(
                "visual_attention_redistribution: a cache whose prompt was run outside; "
                "run it inside too"
            )

    def _redistribute(self, weights: Tensor, attention: Attention) -> Tensor | None:
        if self.keep == 1 or self.dims is None or self._image is None:
            return None
        image = for_keys(self._image, attention)
        sinks = for_keys(self.sinks[attention.layer], attention)
        if not bool((sinks & image).any()):
            return None
        selected = image_centric_heads(weights, sinks, image, self.rho, self.min_mass)
        if attention.offset == 0:
            later = self._image.flip(1).cumsum(1).flip(1)  # image tokens here and later
            rows = attention.rows
            selected = selected & (later == 0)[:, None, rows.start : rows.stop]
        return redistribute(weights, sinks, image, selected, self.keep)

    def _sinks(
        self, blocks: Iterator[tuple[range, Tensor]], attention: Attention, real: Tensor
    ) -> Tensor:
        if not self.dims:
            columns, last = Columns(), self.prompt
            for rows, weights in blocks:
                rows = rows[: None if last is None else max(last - rows.start, 0)]
                if not rows:
                    break
                visible = attention.visible_of(rows) & real[:, None, rows.start : rows.stop, None]
                columns.add(weights.mean(1)[:, : len(rows), :last], visible[:, 0, :, :last])
            heavy = columns.sinks(theta=None, alpha=self.alpha)
            return torch.nn.functional.pad(heavy, (0, real.shape[1] - heavy.shape[1])) & real
        if attention.hidden is None:
            raise ValueError(
                f"visual_attention_redistribution: {attention.name} does not show its layer's input"
            )
        return (sink_score(attention.hidden, self.dims) > self.tau) & real


def find_visual_sinks(
    model: nn.Module,
    *args: Any,
    dims: Sequence[int] | str = "auto",
    image: Bool[Tensor, "b t"] | None = None,
    tau: float = 20.0,
    skip_layers: Collection[int] = (0, 1),
    where: str | None = None,
    **inputs: Any,
) -> dict[int, Bool[Tensor, "b t"]]:
    """Which image tokens of a prompt are sinks, by layer, from one run of the model.

    Arguments as for `visual_attention_redistribution`; the others are the model's.
    """
    steering = visual_attention_redistribution(
        model,
        dims,
        image=image,
        tau=tau,
        rho=0.0,
        min_mass=1.0,
        skip_layers=skip_layers,
        skip_last=False,
        where=where,
    )
    with torch.no_grad(), steering:  # these limits leave every row as it is
        model(*args, **inputs)
    image = steering._image
    return {} if image is None else {n: sinks & image for n, sinks in steering.sinks.items()}


def _text(model: nn.Module, where: str | None) -> str | None:
    """The part of the paths that tells the language model from the vision tower."""
    if where is not None:
        return where
    names = [point.name for point in points(model)]
    return "language_model" if any("language_model" in name for name in names) else None


def _text_points(model: nn.Module, where: str | None) -> list[Any]:
    part = _text(model, where)
    return [p for p in points(model) if p.kind == "self" and (part is None or part in p.name)]
