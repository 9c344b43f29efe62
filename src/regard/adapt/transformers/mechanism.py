"""The part that is attached to an attention layer, and the attention function that runs it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop_out

from regard.adapt.learned import Learned, scales_scores
from regard.adapt.site import Site
from regard.adapt.swapped import ATTRIBUTE
from regard.adapt.transformers import short
from regard.adapt.transformers.caches import MARK, Call, StateLayer, state_layer
from regard.adapt.transformers.sight import Sight, see
from regard.adapt.transformers.sites import CROSS
from regard.core.card import Card
from regard.core.checks import reject, words
from regard.core.patterns import Pattern
from regard.mixers.arguments import check_options, taken

TOKENS = "hidden_states"
MEMORIES = ("key_value_states", "encoder_hidden_states")


class Mechanism(nn.Module):
    """What `swap` attaches to a layer: the card, its options, and what is learned.

    Hooks on the layer show it the tokens (operands are made from them) and the cache.
    """

    def __init__(
        self,
        card: Card,
        site: Site,
        options: Mapping[str, Any],
        learn: tuple[str, ...] = (),
        drop: Collection[str] = (),
        past: int = 0,
    ) -> None:
        super().__init__()
        self.card, self.path, self.kind = card, site.name, site.kind
        self.given = dict(options)
        self.learn, self.drop, self.past = learn, tuple(drop), past
        own = dict(options)
        self.learned = Learned("swap", card, site, own, learn)
        self.options = check_options("swap", own, card, self.learned.names())
        self.tokens: Tensor | None = None
        self.memory: Tensor | None = None
        self.decoding = False
        self.own_config: Any = None  # the layer's, while it has a private copy

    def extra_repr(self) -> str:
        return f"{self.card.name!r}, options={self.options}"

    @property
    def implied(self) -> bool:
        """Whether a mask of None means causal: under every implementation of masks but "eager"."""
        return getattr(self.own_config, "_attn_implementation", "sdpa") != "eager"

    def enter(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the layer runs: its tokens and its cache."""
        bound = inspect.signature(layer.forward).bind_partial(*args, **kwargs).arguments
        for group in list(bound.values()):
            if isinstance(group, dict):
                bound = {**group, **bound}
        self.tokens = bound.get(TOKENS)
        self.memory = next((bound[n] for n in MEMORIES if bound.get(n) is not None), None)
        self.decoding = False
        if self.card.state == "fixed" and self.kind == "self" and getattr(layer, "is_causal", 0):
            names = ("cache", "past_key_values", "past_key_value", "layer_past")
            cache = next((bound[n] for n in names if bound.get(n) is not None), None)
            index = getattr(layer, "layer_idx", None)
            if cache is not None:
                found = state_layer(f"{self.path} ({self.card.name})", cache, index, self.past)
                self.decoding = found is not None

    def leave(self) -> None:
        """After it ran, or failed."""
        self.tokens = self.memory = None
        self.decoding = False


def entering(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """The hook before a swapped layer."""
    getattr(layer, ATTRIBUTE).enter(layer, args, kwargs)


def leaving(layer: Any, args: tuple, output: Any) -> None:
    """The hook after it."""
    getattr(layer, ATTRIBUTE).leave()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    card: Card | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function in the convention of transformers: the module's mechanism, or `card`.

    Shapes: query [B, H, T, D], key and value [B, Hk, S, D] -> [B, T, H, Dv] and no weights.
    Dropout acts on the outputs, not on weights that most mechanisms do not have.
    """
    part = getattr(module, ATTRIBUTE, None)
    part = part if isinstance(part, Mechanism) else None
    card = part.card if part is not None else card
    assert card is not None
    run = _Run(module, card, part)
    if others.get("output_attentions"):
        accepted = "False: no matrix is kept; regard.lens.tap reads the weights of any layer"
        raise reject(run.op, "output_attentions", accepted, True)
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    causal = bool(causal) and run.kind == "self"
    extras = {"softcap": softcap, "sinks": s_aux, "position_bias": position_bias}
    run.check_packed(others, attention_mask)
    out = run(query, key, value, attention_mask, scaling, causal, extras)
    if dropout:
        out = drop_out(out, dropout, getattr(module, "training", True))
    return out.transpose(1, 2).contiguous(), None


class _Run:
    """One call of one layer."""

    def __init__(self, module: Any, card: Card, part: Mechanism | None) -> None:
        self.module, self.card, self.part = module, card, part
        self.takes = taken(card)
        self.op = f"{card.name} in {part.path}" if part is not None else f"regard:{card.name}"
        self.kind = part.kind if part is not None else _kind(module)
        self.drop = part.drop if part is not None else ()
        self.packed = False
        if part is None and card.operands:
            names = ", ".join(operand.name for operand in card.operands)
            raise reject(
                self.op, "model", f"one given {names} by regard.adapt.swap(model, {card.name!r})",
                words("a model without"),
            )  # fmt: skip

    def refuse(self, name: str, accepted: str, got: Any) -> None:
        raise reject(self.op, name, accepted, got)

    def check_packed(self, others: Mapping[str, Any], mask: Any) -> None:
        """Offsets of packed sequences that the mask does not repeat would be lost."""
        offsets = others.get("cu_seq_lens_q")
        self.packed = offsets is not None and offsets.numel() > 2

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scaling: float | None,
        causal: bool,
        extras: dict[str, Any],
    ) -> Tensor:
        layer: StateLayer | None = getattr(k, MARK, None)
        part = self.part
        if part is not None and part.decoding and layer is None:
            raise RuntimeError(
                f"{self.op}: the model changes the keys that its cache gives back, so that their "
                "state is lost; call it with use_cache=False"
            )
        if layer is not None and self.card.state != "fixed":
            self.refuse("cache", "a new one: this one holds states of another mechanism", k)
        B, _, T, _ = q.shape
        S = k.shape[2] + (0 if layer is None else layer.length)
        implied = part.implied if part is not None else True
        sight = see(self.op, mask, B, T, S, causal, implied=implied)
        if mask is None and causal and T == 1:
            sight = Sight(True)  # the last token, whatever None means
        if sight.keys is not None and layer is None:
            k, v, S = k[:, :, : sight.keys], v[:, :, : sight.keys], sight.keys
        if self.packed and sight.segments is None:
            accepted = "None or of the packed sequences, which need a call with use_cache=False"
            self.refuse("cu_seq_lens_q", accepted, words("offsets that the mask does not have"))
        given: dict[str, Any] = dict(part.options) if part is not None else {}
        if scales_scores(self.card) and scaling is not None:
            given.setdefault("scale", float(scaling))
        if part is not None:
            self._check_tokens(part, k, layer)
            given |= part.learned.arguments(scaling, part.tokens, part.memory)
        self._mask(given, sight, q, extras.pop("position_bias"))
        self._extras(given, extras)
        given["causal"] = self._causal(sight)
        if sight.segments is not None:
            return self._separate(given, sight.segments, q, k, v)
        if layer is not None:
            return self._continue(layer, given, q, k, v)
        if short.serves(self.card, given, q, k):
            return short.attend(q, k, v, **given)
        return self.card.op(q=q, k=k, v=v, **given)

    def _causal(self, sight: Sight) -> bool:
        pattern = Pattern.CAUSAL_CROSS if self.kind == "cross" else Pattern.NONCAUSAL_SELF
        pattern = Pattern.CAUSAL_SELF if sight.causal else pattern
        if sight.hidden is None and pattern not in self.card.patterns:
            served = ", ".join(item.value for item in self.card.patterns)
            self.refuse("attention_mask", f"of {served}", words(f"one of {pattern.value}"))
        return sight.causal

    def _check_tokens(self, part: Mechanism, k: Tensor, layer: StateLayer | None) -> None:
        """Operands of keys are made from tokens: all of them must be there."""
        if not any(operand.source == "key" for operand in self.card.operands):
            return
        source = part.tokens if part.memory is None else part.memory
        if source is not None and source.shape[1] != k.shape[2]:
            held = k.shape[2] - source.shape[1]
            self.refuse("cache", "one that this mechanism filled", words(f"{held} older keys"))

    def _mask(
        self, given: dict[str, Any], sight: Sight, q: Tensor, position_bias: Tensor | None
    ) -> None:
        window = None if "window" in self.drop else sight.window
        if sight.key_mask is not None:
            if "key_mask" not in self.takes:
                self.refuse("attention_mask", "without padding: the op has no key_mask", q)
            given["key_mask"] = sight.key_mask
        if window is not None:
            if "window" not in self.takes or "window" in given:
                accepted = "without a window, which the op cannot have (drop='window' forgets it)"
                self.refuse("attention_mask", accepted, words(f"one of a window {window}"))
            given["window"] = window
        if "position_bias" in self.drop:
            position_bias = None
        biases = [b for b in (sight.bias, position_bias) if b is not None]
        if sight.hidden is None and not biases:
            return
        if "bias" not in self.takes:
            name = "position_bias" if position_bias is not None else "attention_mask"
            self.refuse(name, "None or plain: the op has no bias", words("a bias on scores"))
        if sight.segments is not None:
            self.refuse("position_bias", "None with packed sequences", words("one"))
        total: Any = sum(biases) if biases else q.new_zeros(1, 1, 1, 1)
        if sight.keys is not None:
            total = total[..., : sight.keys]
        if sight.hidden is not None:
            total = torch.where(sight.hidden, -torch.inf, total)
        given["bias"] = total

    def _extras(self, given: dict[str, Any], extras: dict[str, Any]) -> None:
        for name, value in extras.items():
            if value is None or name in self.drop:
                continue
            if name not in self.takes:
                accepted = f"None: the op has no {name} (drop={name!r} forgets it)"
                self.refuse(name, accepted, value)
            given[name] = value.to(torch.float32) if isinstance(value, Tensor) else value

    def _separate(
        self, given: dict[str, Any], segments: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Packed sequences, row by row."""
        if "cu_seqlens" not in self.takes:
            accepted = "of one sequence a row: the op has no cu_seqlens"
            self.refuse("attention_mask", accepted, words("packed sequences"))
        rows = []
        B, T = segments.shape
        for b in range(B):
            starts = (segments[b].diff() != 0).nonzero().flatten() + 1
            ends = starts.new_tensor([0]), starts, starts.new_tensor([T])
            own = {n: x[b : b + 1] if n in self._per_row() else x for n, x in given.items()}
            part = (x[b : b + 1] for x in (q, k, v))
            offsets = torch.cat(ends).to(torch.int32)
            rows.append(self.card.op(*part, **own, cu_seqlens=offsets) if not self.card.operands
                        else self._named(part, own, offsets))  # fmt: skip
        return torch.cat(rows)

    def _named(self, parts: Any, own: dict[str, Any], offsets: Tensor) -> Tensor:
        return self.card.op(**dict(zip("qkv", parts, strict=True)), **own, cu_seqlens=offsets)

    def _per_row(self) -> set[str]:
        rows = {o.name for o in self.card.operands if o.shape.split()[0] == "b"}
        return rows | {"key_mask"}

    def _continue(
        self, layer: StateLayer, given: dict[str, Any], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """With the state of the tokens before; operands of the call are of the new keys."""
        n = k.shape[2]
        if not given["causal"]:
            self.refuse("attention_mask", "causal with a cache", words("a mask that is not"))
        if given.get("key_mask") is not None:
            given["key_mask"] = given["key_mask"][:, -n:]
        axes = {o.name: o.shape.split() for o in self.card.operands}
        per_token = {"q": (q, 2), "k": (k, 2), "v": (v, 2)}
        for name, value in given.items():
            if name == "key_mask":
                per_token[name] = (value, 1)
            elif name in axes and ("s" in axes[name] or "t" in axes[name]):
                token = "s" if "s" in axes[name] else "t"
                per_token[name] = (value, axes[name].index(token))
        fixed = {name: value for name, value in given.items() if name not in per_token}
        call = Call(self.card.op, per_token, fixed)
        out, state = self.card.op(
            **{name: x for name, (x, _) in per_token.items()}, **fixed,
            state=layer.state, return_state=True,
        )  # fmt: skip
        layer.remember(state, call)
        return out


def _kind(module: Any) -> str:
    cross = CROSS.search(type(module).__name__) or getattr(module, "is_cross_attention", False)
    return "cross" if cross else "self"
