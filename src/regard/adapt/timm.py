"""Mechanisms of ours in the `Attention` modules of timm's vision transformers.

Such a module has a fused projection `qkv`, `proj`, and often `q_norm`, `k_norm`, `norm`,
`attn_drop`, `proj_drop` and `gate`. It is known by that layout, not by its class, so the module
itself is not imported: models in timm's style from elsewhere are served as well. `swap` puts a
module of the same children, and therefore the same keys in a state dict, in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapt.fitting import find, refuses
from regard.adapt.learned import Learned, pieces, scales_scores
from regard.adapt.reporting import Report, fill
from regard.adapt.site import Layers, Site, choose
from regard.adapt.swapped import ATTRIBUTE, Swap
from regard.core.card import Card
from regard.core.checks import reject, words
from regard.core.patterns import Pattern
from regard.mixers.arguments import check_options, taken

NEEDED = ("qkv", "proj")
KNOWN = (*NEEDED, "q_norm", "k_norm", "norm", "attn_drop", "proj_drop", "gate", ATTRIBUTE)
CALLED = ("self", "x", "attn_mask", "is_causal")


class SwappedAttention(nn.Module):
    """Attention of timm's layout by one of our mechanisms; learned parts are under `regard`.

        y = proj(norm(mechanism(q_norm(q), k_norm(k), v)) sigmoid(gate(x)))      q, k, v = qkv(x)

    Shapes: x [B, N, C], `attn_mask` None, or bool [B, 1, 1, N] (True = a real token), or, for a
    mechanism with biases, whatever broadcasts to [B, H, N, N]. `attn_drop` acts on the outputs
    of the mechanism, which has no weights to drop. `is_causal`: of a call, as in timm; then without
    `attn_mask`, and for mechanisms that serve it.
    """

    qkv: Any
    proj: Any
    regard: Any
    original: Any

    def __init__(
        self, original: Any, site: Site, card: Card, options: dict[str, Any], learn: tuple[str, ...]
    ) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.num_heads = site.heads
        self.scale = getattr(original, "scale", None)
        self.card, self.path = card, site.name
        own = dict(options)
        self.regard = Learned("swap", card, site, own, learn)
        self.options = check_options("swap", own, card, self.regard.names())
        self.takes = taken(card)
        self.train(original.training)
        # Not a child: its parameters are those of this module.
        object.__setattr__(self, "original", original)

    def extra_repr(self) -> str:
        return f"mechanism={self.card.name!r}, options={self.options}"

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self._child("q_norm", q), self._child("k_norm", k)
        scale = self.scale if isinstance(self.scale, float | int) else None
        given = dict(self.options)
        if scales_scores(self.card) and scale is not None:
            given.setdefault("scale", float(scale))
        given |= self.regard.arguments(q.shape[3] ** -0.5 if scale is None else scale, x, None)
        if is_causal:
            self._check_causal(attn_mask)
        if attn_mask is not None:
            given |= self._masked(attn_mask, B, N)
        out = self._child("attn_drop", self.card.op(q=q, k=k, v=v, causal=is_causal, **given))
        out = self._child("norm", out.transpose(1, 2).reshape(B, N, -1))
        if "gate" in self._modules:
            out = out * self._child("gate", x).sigmoid()
        return self._child("proj_drop", self.proj(out))

    def _child(self, name: str, x: Tensor) -> Tensor:
        child = self._modules.get(name)
        return x if child is None else child(x)

    def _check_causal(self, mask: Tensor | None) -> None:
        op = f"{self.card.name} in {self.path}"
        if Pattern.CAUSAL_SELF not in self.card.patterns:
            raise reject(op, "is_causal", "False: the mechanism serves no causal attention", True)
        if mask is not None:
            raise reject(op, "attn_mask", "None with is_causal", mask)

    def _masked(self, mask: Tensor, B: int, N: int) -> dict[str, Tensor]:
        op = f"{self.card.name} in {self.path}"
        rows = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, 1)
        if rows and "key_mask" in self.takes:
            return {"key_mask": mask[:, 0, 0].expand(B, N)}
        if "bias" not in self.takes:
            accepted = "None: the op has no bias of scores"
            if "key_mask" in self.takes:
                accepted = f"None or bool [{B}, 1, 1, {N}]: the op has no other mask"
            raise reject(op, "attn_mask", accepted, mask)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
        return {"bias": mask}


def sites(model: nn.Module) -> tuple[Site, ...]:
    """All modules of timm's layout, in the order of the model."""
    found = [(n, m) for n, m in model.named_modules() if _is_site(m)]
    return tuple(_site(number, name, module) for number, (name, module) in enumerate(found))


def swap(
    model: nn.Module,
    mechanism: str | Card,
    layers: Layers = None,
    *,
    learn: str | Collection[str] = (),
    **options: Any,
) -> Swap:
    """Puts a mechanism into the attention modules of a model in timm's layout, in place.

    Keys of the state dict stay as they are (what a mechanism learns is added, under `regard`),
    and so do the parameters themselves: projections and norms are taken over, not copied.

    Args: as of `regard.adapt.transformers.swap`; layers counts the modules of `report`.

    Raises: ValueError, TypeError: an unknown mechanism, layer or option; a layer with more than
        the layout (a rotary embedding, a position bias, a gate), which the mechanism would lose.

    >>> class Attention(nn.Module):  # as timm's
    ...     def __init__(self, dim, num_heads):
    ...         super().__init__()
    ...         self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
    ...         self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
    ...     def forward(self, x): ...
    >>> model = nn.Sequential(Attention(8, 2))
    >>> swap(model, "linear")
    Swap(mechanism='linear', layers=('0',))
    >>> model(torch.randn(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    >>> list(model.state_dict())
    ['0.qkv.weight', '0.qkv.bias', '0.proj.weight', '0.proj.bias']
    """
    op = "swap"
    card, found = find(op, mechanism), sites(model)
    if not found:
        accepted = f"a model with modules of timm's layout ({', '.join(NEEDED)}, num_heads)"
        raise reject(op, "model", accepted, words(type(model).__name__))
    chosen, learn = choose(op, found, layers), pieces(learn)
    for site in chosen:
        reason = unreachable(site) or refuses(card, site)
        if reason is not None:
            accepted = f"other than {card.name!r} for {site.name or 'the model'}: {reason}"
            raise reject(op, "mechanism", accepted, card.name)
    made = {s.name: SwappedAttention(_original(s.module), s, card, options, learn) for s in chosen}
    for layer in made.values():
        layer.regard.to(layer.qkv.weight.device)
    for name, layer in made.items():
        _put(model, name, layer)
    return Swap(model, card.name, tuple(made), restore)


def restore(model: nn.Module, layers: Layers = None) -> None:
    """The modules that were there before `swap`; layers as of `swap`."""
    found = sites(model)
    for site in choose("restore", found, layers) if found else []:
        if isinstance(site.module, SwappedAttention):
            original = site.module.original
            original.train(site.module.training)
            _put(model, site.name, original)


def report(model: nn.Module) -> Report:
    """Which modules of timm's layout a model has, and which mechanism each can take."""
    found = sites(model)
    if not found:
        accepted = f"a model with modules of timm's layout ({', '.join(NEEDED)}, num_heads)"
        raise reject("report", "model", accepted, words(type(model).__name__))
    modules = [site.module for site in found]
    names = tuple(m.card.name if isinstance(m, SwappedAttention) else None for m in modules)
    return fill(model, found, names, unreachable)


def unreachable(site: Site) -> str | None:
    """What of the layer no mechanism would keep, or None."""
    module = _original(site.module)
    more = [name for name, _ in module.named_children() if name not in KNOWN]
    more += [name for name, _ in module.named_parameters(recurse=False)]
    called = inspect.signature(type(module).forward).parameters
    more += [name for name in called if name not in CALLED]
    for flag in ("rotate_half", "is_causal"):
        if getattr(module, flag, False):
            more.append(flag)
    if more:
        return f"the module has more than the layout is known for: {', '.join(more)}"
    if module.qkv.out_features != 3 * module.proj.in_features:
        return "its qkv does not make queries, keys and values of the same size"
    return None


def _is_site(module: nn.Module) -> bool:
    children = dict(module.named_children())
    linear = all(isinstance(children.get(name), nn.Linear) for name in NEEDED)
    return linear and isinstance(getattr(module, "num_heads", None), int)


def _site(number: int, name: str, module: Any) -> Site:
    heads, width, dim = module.num_heads, module.proj.in_features, module.qkv.in_features
    return Site(
        number, name, module, "self", False, heads, heads, width // heads, dim, dim, None, None,
        sinks=False, position_bias=False,
    )  # fmt: skip


def _original(module: Any) -> Any:
    return module.original if isinstance(module, SwappedAttention) else module


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    if not name:
        raise reject("swap", "model", "the model around the layer", words("the layer itself"))
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
