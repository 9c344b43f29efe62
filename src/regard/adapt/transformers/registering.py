"""Names for `model.set_attn_implementation`: `regard:softmax`, `regard:linear`, ..."""

from __future__ import annotations

from functools import partial

from regard.adapt.fitting import CARDS, fits
from regard.adapt.transformers.mechanism import attend
from regard.core.card import Card

PREFIX = "regard:"


def register() -> tuple[str, ...]:
    """Registers every mechanism that a model can take, and says under which names.

    Both interfaces of transformers get the name: the attention functions *and* the masks.
    (With the first alone a model makes no mask, and attention silently loses padding and
    causality.) Then `model.set_attn_implementation("regard:local_linear")` and
    `attn_implementation="regard:local_linear"` use the op with its defaults in every layer.

    `swap` registers what it needs by itself, and does more: options, learned parts, single
    layers, states of fixed size in caches, and reasons before anything runs. Under a name alone,
    mechanisms with operands to learn refuse when they are called, and those with a state of
    fixed size compute from the model's cache of keys: the same outputs at a higher cost.

    >>> names = register()
    >>> "regard:softmax" in names, "regard:block_sparse" in names
    (True, False)
    """
    return tuple(register_one(card) for card in CARDS.values() if fits(card))


def register_one(card: Card) -> str:
    """One mechanism, in both interfaces."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    name = PREFIX + card.name
    AttentionInterface.register(name, partial(attend, card=card))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
