"""`swap`, `restore`: a mechanism in the attention layers of a model, and the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from regard.adapt.fitting import check_dropped, find, refuses
from regard.adapt.learned import pieces
from regard.adapt.site import Layers, Site, choose
from regard.adapt.swapped import ATTRIBUTE, Swap
from regard.adapt.transformers import mechanism as parts
from regard.adapt.transformers.mechanism import Mechanism
from regard.adapt.transformers.registering import PREFIX, register_one
from regard.adapt.transformers.sites import sites
from regard.core.card import Card
from regard.core.checks import check_integer, reject, words

HANDLES = "_regard_handles"  # of a swapped layer: its hooks


def swap(
    model: nn.Module,
    mechanism: str | Card,
    layers: Layers = None,
    *,
    learn: str | Collection[str] = (),
    drop: str | Collection[str] = (),
    past: int = 0,
    **options: Any,
) -> Swap:
    """Puts a mechanism into attention layers of a model of transformers, in place.

    The layer keeps its projections, positions and cache; the mechanism gets the queries, keys
    and values that it computes, and the mask that the model makes. Padding on either side,
    windows, packed rows, soft caps, sinks and biases of scores are given to the op, or refused
    by name where it has no such thing: at once if the layer shows it, otherwise when it comes.
    Nothing is changed unless every layer can take the mechanism.

    Args:
        mechanism: the name of a card or a card.
        layers: numbers (see `report`), paths, or patterns of paths; None: all.
        learn: "ridge" (of local linear attention, from `ridge`), "bandwidth" or "temperature"
            (a factor on the layer's scale): one parameter per head. Operands and feature maps
            that a mechanism is made of are parameters always.
        drop: "window", "softcap", "sinks", "position_bias": what the layer has, the mechanism
            has not, and is to be forgotten rather than refused.
        past: tokens that a cache of fixed-size states can take back by `crop`, at least.
        options: of the op; for Hedgehog also `features`, `feature_dim`, `feature_options`,
            `share_key_maps` and `gamma`, as of `regard.mixers.Hedgehog`.

    The layer's scale goes to ops whose scores are scaled (all but linear and lightning
    attention, which have another `scale`); give `scale` for another one. New parameters are at
    `<layer>.regard`, on the layer's device (in float32 for a model in 16 bits): they are in the
    state dict, and `save_pretrained` and `from_pretrained` of this module keep the swap itself.
    A swapped layer gives no attention weights; `regard.lens.tap` reads them.

    Fixed-size states: an empty layer of the model's DynamicCache is replaced by a `StateLayer`
    when the first tokens come, so that `generate` and use_cache=True decode with the state.

    Raises: ValueError, TypeError: an unknown mechanism, layer or option, a layer that cannot
        take it (with the reason), a model without attention layers of this kind.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> small = dict(vocab_size=11, hidden_size=16, intermediate_size=16)
    >>> heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaModel(LlamaConfig(**small, **heads)).eval()
    >>> tokens = torch.arange(6)[None]
    >>> before = model(tokens).last_hidden_state
    >>> swap(model, "local_linear", ridge=1e6, learn=("ridge", "bandwidth"))
    Swap(mechanism='local_linear', layers=('layers.0.self_attn', 'layers.1.self_attn'))
    >>> torch.allclose(model(tokens).last_hidden_state, before, atol=1e-4)
    True
    >>> restore(model)
    >>> torch.equal(model(tokens).last_hidden_state, before)
    True
    """
    op = "swap"
    card = find(op, mechanism)
    found = sites(model)
    if not found:
        accepted = "a model whose attention goes through the AttentionInterface of transformers"
        raise reject(op, "model", accepted, words(type(model).__name__))
    chosen = choose(op, found, layers)
    learn = pieces(learn)
    dropped = check_dropped(op, drop)
    check_integer(op, "past", past, least=0)
    for site in chosen:
        reason = unreachable(site) or refuses(card, site, dropped)
        if reason is not None:
            what = f"other than {card.name!r} for {site.name}: {reason}"
            raise reject(op, "mechanism", what, card.name)
    made = [Mechanism(card, site, options, learn, dropped, past) for site in chosen]
    for site, part in zip(chosen, made, strict=True):
        part.to(_device(site.module))
    # From here on nothing fails but for lack of memory; what was done is then taken back.
    before = [(site, getattr(site.module, ATTRIBUTE, None)) for site in chosen]
    register_one(card)
    try:
        for site, part in zip(chosen, made, strict=True):
            _detach(site.module)
            _attach(site.module, part)
    except BaseException:
        for site, old in before:
            _detach(site.module)
            if isinstance(old, Mechanism):
                _attach(site.module, old)
        raise
    return Swap(model, card.name, tuple(site.name for site in chosen), restore)


def restore(model: nn.Module, layers: Layers = None) -> None:
    """Takes mechanisms out again: the model computes what it did before `swap`, to the bit.

    Learned parts are thrown away; layers that were not swapped are left alone. `layers` as of
    `swap`.
    """
    found = sites(model)
    for site in choose("restore", found, layers) if found else []:
        _detach(site.module)


@contextmanager
def swapped(model: nn.Module, mechanism: str | Card, *args: Any, **options: Any) -> Iterator[Swap]:
    """`swap` for the time of a `with` block; what was swapped before is back afterwards.

    Args: as of `swap`.
    """
    before = {site.number: getattr(site.module, ATTRIBUTE, None) for site in sites(model)}
    done = swap(model, mechanism, *args, **options)
    try:
        yield done
    finally:
        for site in sites(model):
            old = before.get(site.number)
            if getattr(site.module, ATTRIBUTE, None) is not old:
                _detach(site.module)
                if isinstance(old, Mechanism):
                    _attach(site.module, old)


def unreachable(site: Site) -> str | None:
    """Why no mechanism can be put into the layer as the model is now, or None."""
    implementation = own_config(site.module)._attn_implementation or "eager"
    if "flash" in implementation or implementation.startswith(("flex", "paged")):
        return (
            f"the model makes masks for {implementation!r}: call "
            "model.set_attn_implementation('sdpa') first"
        )
    return None


def own_config(module: Any) -> Any:
    """The config that the module has without a swap."""
    part = getattr(module, ATTRIBUTE, None)
    return part.own_config if isinstance(part, Mechanism) else module.config


def _attach(layer: Any, part: Mechanism) -> None:
    """The part, its hooks, and a private copy of the config that names its attention function."""
    part.own_config = layer.config
    # A shallow copy, changed past the setter, which would reach into shared sub-configs. The
    # model's own config, and with it the masks and caches that it makes, stays as it is.
    private = copy.copy(layer.config)
    private.__dict__["_attn_implementation_internal"] = PREFIX + part.card.name
    part.train(layer.training)
    setattr(layer, ATTRIBUTE, part)
    handles = (
        layer.register_forward_pre_hook(parts.entering, with_kwargs=True),
        layer.register_forward_hook(parts.leaving, always_call=True),
    )
    object.__setattr__(layer, HANDLES, handles)
    layer.config = private


def _detach(layer: Any) -> None:
    part = getattr(layer, ATTRIBUTE, None)
    if not isinstance(part, Mechanism):
        return
    layer.config = part.own_config
    for handle in layer.__dict__.pop(HANDLES, ()):
        handle.remove()
    # A copy of the model has copies of handles, which may not know its hooks: by what they are.
    for hooks, own in (
        (layer._forward_pre_hooks, parts.entering),
        (layer._forward_hooks, parts.leaving),
    ):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            for flags in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
                getattr(layer, flags, {}).pop(key, None)
    delattr(layer, ATTRIBUTE)


def _device(module: nn.Module) -> Any:
    first = next(module.parameters(), None)
    return None if first is None else first.device
