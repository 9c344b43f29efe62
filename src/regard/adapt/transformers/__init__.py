"""Mechanisms of ours in the attention layers of models of transformers.

The files:

- `sites.py`: the attention layers of a model, and what is known of them before they run
- `sight.py`: from a mask of transformers to causality, real keys, windows and packed sequences
- `mechanism.py`: the part that is attached to a layer, and the attention function itself
- `caches.py`: a cache layer for states of fixed size
- `swapping.py`: `swap` and `restore`; `registering.py`: names for `set_attn_implementation`
- `reporting.py`: which layer can take what; `skeleton.py`: a folder's model without its weights
- `saving.py`: folders and back
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError(
        "regard.adapt.transformers needs the library transformers: pip install 'regard[hf]'"
    )

from regard.adapt.reporting import Report
from regard.adapt.site import Site
from regard.adapt.swapped import Swap
from regard.adapt.transformers.caches import StateLayer
from regard.adapt.transformers.mechanism import Mechanism
from regard.adapt.transformers.registering import register
from regard.adapt.transformers.reporting import report
from regard.adapt.transformers.saving import from_pretrained, save_pretrained
from regard.adapt.transformers.sites import sites
from regard.adapt.transformers.skeleton import skeleton
from regard.adapt.transformers.swapping import restore, swap, swapped

__all__ = [
    "Mechanism",
    "Report",
    "Site",
    "StateLayer",
    "Swap",
    "from_pretrained",
    "register",
    "report",
    "restore",
    "save_pretrained",
    "sites",
    "skeleton",
    "swap",
    "swapped",
]
