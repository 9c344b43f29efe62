"""Conversion: a layer of softmax attention becomes a Hedgehog layer on the same projections."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from regard.core.checks import check_choice, reject, words
from regard.mixers import Attention, Hedgehog
from regard.models import Decoder, MixerConfig

SHARED = (
    "q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "q_norm", "k_norm", "short_conv", "dropout",
)  # fmt: skip
TAKEN = (
    "heads", "kv_heads", "head_dim", "qk_norm", "rope", "short_conv", "output_gate", "dropout",
)  # fmt: skip
STUDENT = (
    "features", "feature_dim", "feature_options", "share_key_maps", "window_length", "gamma",
)  # fmt: skip
KEPT_OPTIONS = ("scale",)  # of the teacher, that a student's window has as well


def convert(
    model: nn.Module,
    *,
    features: str = "softmax_dim",
    feature_dim: int | None = None,
    feature_options: Mapping[str, Any] | None = None,
    share_key_maps: bool = False,
    window_length: int | None = None,
    layout: str = "sliding",
    gamma: float = 0.1,
    affine: bool = False,
    keep: Collection[str | int] = (),
) -> list[str]:
    """Replaces every softmax `Attention` in `model` by a `Hedgehog`, and says which, by name.

    Projections, norms and gates are taken over, not copied; feature maps start as the identity
    (see `Hedgehog` for them). The layers remember the options of their teacher, so that
    `transferring` can have it back.

    Args:
        window_length, layout, gamma, affine: of a softmax window, see
            `regard.ops.hedgehog_window_attention`; None: no window.
        keep: layers that stay, by name or by number among the softmax layers.

    Raises: ValueError for a model without softmax layers, or a name that is none of theirs.

    >>> from regard.models import Decoder, DecoderConfig, MixerConfig
    >>> mixer = MixerConfig("attention", {"heads": 2, "rope": True})
    >>> model = Decoder(DecoderConfig((mixer,), vocabulary=11, dim=16, layers=2, mlp_dim=32))
    >>> convert(model, window_length=4, keep=[0])
    ['layers.1.mixer']
    """
    found = [name for name, module in model.named_modules() if is_softmax(module)]
    if not found:
        raise reject("convert", "model", "one with softmax layers", words(type(model).__name__))
    kept = {found[item] if isinstance(item, int) else item for item in _numbers(keep, len(found))}
    for name in kept:
        check_choice("convert", "keep", name, found)
    settings = {
        "features": features, "feature_dim": feature_dim, "feature_options": feature_options,
        "share_key_maps": share_key_maps, "window_length": window_length, "layout": layout,
        "gamma": gamma, "affine": affine,
    }  # fmt: skip
    names = [name for name in found if name not in kept]
    made = {name: from_attention(model.get_submodule(name), **settings) for name in names}
    for name, layer in made.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    if isinstance(model, Decoder):
        _tell_config(model, settings)
    return names


def _tell_config(model: Decoder, settings: Mapping[str, Any]) -> None:
    """So that a converted decoder is saved, and read again, as what it is."""
    config, mixers = model.config, []
    for number, block in enumerate(model.layers):
        mixer: Any = block.mixer
        described = config.mixer(number)
        if isinstance(mixer, Hedgehog) and mixer.teacher_options is not None:
            options = {name: value for name, value in described.options.items() if name in TAKEN}
            given = {name: value for name, value in settings.items() if name in STUDENT}
            own = {"options": {n: x for n, x in mixer.options.items() if n not in mixer.GIVEN}}
            described = MixerConfig("hedgehog", {**options, **given, **own})
        mixers.append(described)
    model.config = replace(config, mixers=tuple(mixers))


def _numbers(keep: Collection[str | int], count: int) -> Collection[str | int]:
    for item in keep:
        if isinstance(item, int) and not 0 <= item < count:
            raise reject("convert", "keep", f"below {count}, the number of softmax layers", item)
    return keep


def is_softmax(module: nn.Module) -> bool:
    """Whether a module is an attention layer that can be a teacher."""
    return type(module) is Attention and module.card.name == "softmax"


def from_attention(
    layer: Any,
    *,
    features: str = "softmax_dim",
    feature_dim: int | None = None,
    feature_options: Mapping[str, Any] | None = None,
    share_key_maps: bool = False,
    window_length: int | None = None,
    layout: str = "sliding",
    gamma: float = 0.1,
    affine: bool = False,
) -> Hedgehog:
    """A Hedgehog layer on the projections of a softmax layer, which it shares; see `convert`."""
    if not is_softmax(layer):
        accepted = "a layer Attention of mechanism 'softmax'"
        raise reject("from_attention", "layer", accepted, layer, kind=TypeError)
    options: dict[str, Any] = {}
    if window_length is not None:
        options = {"layout": layout, "affine": affine}
        options |= {name: layer.options[name] for name in KEPT_OPTIONS if name in layer.options}
    made = Hedgehog(
        layer.dim, layer.heads, layer.kv_heads, layer.causal, layer.head_dim,
        qk_norm=layer.q_norm is not None, rope=layer.rope_base or False,
        short_conv=layer.short_conv.size if layer.short_conv is not None else 0,
        output_gate=layer.g_proj is not None, features=features, feature_dim=feature_dim,
        feature_options=feature_options, share_key_maps=share_key_maps,
        window_length=window_length, gamma=gamma, options=options,
    )  # fmt: skip
    weight = layer.q_proj.weight
    made.to(device=weight.device, dtype=weight.dtype)
    for name in SHARED:
        setattr(made, name, getattr(layer, name))
    made.teacher_options = dict(layer.options)
    made.train(layer.training)
    return made
