"""Changing the attention of models that somebody else trained.

Each is a context manager over a tap (`regard.lens.tap`), which it always takes away again:

    act_calibration(model, heads)                   sinks of chosen heads give attention back
    visual_attention_redistribution(model, dims)    visual sinks give it to the rest of the image
    visual_boost(model)                             image tokens keep attention while text grows
    edit(model, pre=, post=, output=)               functions of your own

Others have files of their own here: `carve` (the image as the question needs it), `chair` (a
measure of made-up objects) and `freeswim`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.steer.act import (
        act_calibration,
        calibrate_attention,
        find_sinks,
        head_slopes,
        search_heads,
    )
    from regard.steer.editing import edit
    from regard.steer.imbalanced import boost_scores, select_visual_tokens, visual_boost
    from regard.steer.redistribution import (
        find_visual_sinks,
        image_centric_heads,
        redistribute,
        sink_dimensions,
        sink_score,
        visual_attention_redistribution,
    )
    from regard.steer.sensitivity import head_gains, head_sensitivity
    from regard.steer.text_contrast import contrast_logits, contrast_with_text

# Where a function lives: its file is imported when one of its functions is first named.
_FILES: dict[str, tuple[str, ...]] = {
    "act": (
        "act_calibration",
        "calibrate_attention",
        "find_sinks",
        "head_slopes",
        "search_heads",
    ),
    "editing": ("edit",),
    "imbalanced": ("boost_scores", "select_visual_tokens", "visual_boost"),
    "redistribution": (
        "find_visual_sinks",
        "image_centric_heads",
        "redistribute",
        "sink_dimensions",
        "sink_score",
        "visual_attention_redistribution",
    ),
    "sensitivity": ("head_gains", "head_sensitivity"),
    "text_contrast": ("contrast_logits", "contrast_with_text"),
}
_HOMES = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"regard.steer.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'regard.steer' has no attribute {name!r}")


__all__ = [
    "act_calibration",
    "boost_scores",
    "calibrate_attention",
    "contrast_logits",
    "contrast_with_text",
    "edit",
    "find_sinks",
    "find_visual_sinks",
    "head_gains",
    "head_sensitivity",
    "head_slopes",
    "image_centric_heads",
    "redistribute",
    "search_heads",
    "select_visual_tokens",
    "sink_dimensions",
    "sink_score",
    "visual_attention_redistribution",
    "visual_boost",
]
