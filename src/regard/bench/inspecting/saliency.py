"""What a model's answer depends on: parts of the input hidden at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from regard.bench.inspecting.drawing import bars, one_map, over_image
from regard.bench.inspecting.groups import Group, Look
from regard.bench.inspecting.opening import attempt
from regard.bench.inspecting.result import Section
from regard.bench.inspecting.views import MOST, run
from regard.bench.report.words import number
from regard.lens.agreement import correlate, reliability
from regard.lens.maps import rollout
from regard.lens.occlusion import OcclusionSum, Saliency, occlusion_scores
from regard.lens.occlusion_masks import random_masks

BATCH = 8
CELLS = 8  # rows and columns of hidden parts of an image, at most
SEGMENTS = 64  # hidden parts of a recording


def saliency_section(look: Look) -> Section:
    """What the answer depends on, and whether attention says the same."""
    name = type(look.model).__name__
    hidden = {"text": _embeddings, "image": _patches, "audio": _segments}[look.opened.modality]
    shape, names, hide = hidden(look)
    clean = _answer(look, look.answer)
    count = len(clean) if clean.ndim == 2 and _is_distribution(look.answer) else 1
    total = OcclusionSum(count, shape)
    generator = torch.Generator().manual_seed(look.seed)
    masks = random_masks(look.runs, shape, antithetic=True, generator=generator)

    mean = torch.zeros(count, dtype=torch.float64)

    def hide_all() -> None:
        nonlocal mean
        with torch.inference_mode():
            for some in masks.split(BATCH):
                moved = _moved(look, clean, hide(some)).cpu()
                total.add(moved, some)
                mean += moved.double().sum(0) / look.runs

    attempt(f"{name} cannot run with parts of the input hidden", hide_all)
    result = total.result()
    # Every part is hidden in exactly half of the runs: twice the difference to the mean of all is
    # that between the runs with and without it.
    offset = mean.numpy().reshape(-1, *[1] * len(shape))
    found = Saliency(2 * (result.values - offset), _centred(result.halves), look.runs)
    values = found.values.mean(0)
    order = np.argsort(-values.ravel())[:MOST]
    rows = [[names[i], str(i), number(float(values.ravel()[i]))] for i in order]
    sentences = [f"{_target(look)} most on {names[order[0]]!r}."]
    numbers: dict[str, Any] = {"effect": found.values, "parts": names}
    sentences += _against_attention(look, found, numbers)
    tables = [("The parts that matter most:", (["part", "place", "effect"], rows))]
    pictures = [_picture(look, found, values, names)]
    return Section("Saliency", sentences, tables, pictures, numbers)


def _centred(halves: np.ndarray) -> np.ndarray:
    """Maps [2, I, ...] without the level of each row, which says nothing of parts."""
    return halves - halves.mean(tuple(range(2, halves.ndim)), keepdims=True)


def _is_distribution(answer: Any) -> bool:
    return isinstance(getattr(answer, "logits", None), Tensor)


def _causal(look: Look) -> bool:
    own = [group for group in look.groups if group.kind == "self"]
    return bool(own) and all(group.causal for group in own)


def _target(look: Look) -> str:
    if not _is_distribution(look.answer):
        return "The vector of the input depends"
    if look.subject.written:
        return "What the decoder writes depends"
    if look.answer.logits.ndim == 2:
        return "The class probabilities depend"
    return "The next token depends" if _causal(look) else "All tokens' probabilities depend"


def _answer(look: Look, output: Any) -> Tensor:
    """Log-probabilities [B, I, V] (of one input [I, V]), or one vector per input [B, C]."""
    if _is_distribution(output):
        logits = output.logits.float()
        logits = logits[:, None] if logits.ndim == 2 else logits
        if not look.subject.written and output.logits.ndim == 3 and _causal(look):
            logits = logits[:, -1:]
        made = logits.log_softmax(-1)
        return made[0] if output is look.answer else made
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise ValueError(
            f"{type(look.model).__name__} returns neither logits nor last_hidden_state: its answer "
            "has no saliency here"
        )
    states = states.float()
    if states.ndim > 3:  # a map of channels, rows and columns
        return states.flatten(2).mean(-1)
    prefix = look.subject.prefix(states.shape[1])
    return states[:, 0] if prefix else states.mean(1)


def _moved(look: Look, clean: Tensor, output: Any) -> Tensor:
    """How far answers [B, ...] are from the clean one, [B, I]."""
    changed = _answer(look, output)
    if _is_distribution(output):
        return occlusion_scores(clean, changed, scorer="kl")
    return 1 - functional.cosine_similarity(changed, clean.expand_as(changed), dim=-1)[:, None]


Hidden = tuple[tuple[int, ...], list[str], Callable[[Tensor], Any]]


def _repeated(look: Look, count: int) -> dict[str, Tensor]:
    return {
        name: value.repeat(count, *[1] * (value.ndim - 1))
        for name, value in look.subject.inputs.items()
    }


def _embeddings(look: Look) -> Hidden:
    """Tokens of a text: their embeddings become 0."""
    model = look.model
    encoder = model.get_encoder() if look.subject.written else model
    table = encoder.get_input_embeddings()

    def hide(masks: Tensor) -> Any:
        kept = masks[..., None].to(next(model.parameters()).device)

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
            # The decoder may share the table: what it has written is not hidden.
            if output.shape[:2] != kept.shape[:2] or handle_used:
                return None
            handle_used.append(True)
            return output * kept.to(output.dtype)

        handle_used: list[bool] = []
        handle = table.register_forward_hook(hook)
        try:
            return model(**_repeated(look, len(masks)))
        finally:
            handle.remove()

    names = look.subject.words
    return (len(names),), names, hide


def _patches(look: Look) -> Hidden:
    """Rectangles of an image, as large as a patch or larger: standardised pixels become 0."""
    pixels = look.subject.inputs["pixel_values"]
    high, wide = pixels.shape[2:]
    grid = look.subject.grid or (CELLS, CELLS)
    shape = tuple(min(n, max(d for d in range(1, CELLS + 1) if n % d == 0)) for n in grid)

    def hide(masks: Tensor) -> Any:
        kept = functional.interpolate(masks[:, None].float(), (high, wide), mode="nearest")
        inputs = _repeated(look, len(masks))
        inputs["pixel_values"] = inputs["pixel_values"] * kept.to(pixels)
        return look.model(**inputs)

    names = [f"({r}, {c})" for r in range(shape[0]) for c in range(shape[1])]
    return shape, names, hide


def _segments(look: Look) -> Hidden:
    """Equal pieces of a recording: samples become 0, spectrograms their minimum."""
    subject = look.subject
    name = "input_features" if "input_features" in subject.inputs else "input_values"
    whole = subject.inputs[name]
    # Time is the last axis; of a spectrogram [B, frames, bins] (AST) the one before.
    axis = whole.ndim - 1 if whole.ndim < 3 or subject.written else _time_axis(look, whole)
    frames = whole.shape[axis]
    heard = subject.heard(frames)
    pieces = min(SEGMENTS, heard)
    quiet = float(whole.min()) if whole.ndim == 3 else 0.0

    def hide(masks: Tensor) -> Any:
        kept = functional.interpolate(masks[:, None].float(), heard, mode="nearest")[:, 0]
        kept = functional.pad(kept, (0, frames - heard), value=1.0).to(whole)
        kept = kept[:, None] if axis == 2 else kept[..., None] if whole.ndim == 3 else kept
        inputs = _repeated(look, len(masks))
        inputs[name] = quiet + (inputs[name] - quiet) * kept
        return look.model(**inputs)

    step = subject.seconds / pieces
    names = [f"{n * step:.2f} s to {(n + 1) * step:.2f} s" for n in range(pieces)]
    return (pieces,), names, hide


def _time_axis(look: Look, features: Tensor) -> int:
    bins = {
        getattr(look.opened.prepare, name, None)
        for name in ("num_mel_bins", "feature_size", "n_mels")
    }
    return 1 if features.shape[2] in bins and features.shape[1] not in bins else 2


def _against_attention(look: Look, found: Saliency, numbers: dict[str, Any]) -> list[str]:
    """How the rollout correlates with the saliency, where both have the same parts."""
    numbers["ceiling"] = ceiling = reliability(*found.halves)
    group = next((g for g in look.groups if g.kind == "self" and not g.decoder), None)
    values = found.values.mean(0)
    said = f"Its ceiling is {ceiling:.2f}: what a perfect map would correlate with."
    if group is None or look.subject.written or look.opened.modality == "audio":
        return [said]
    shares = _rollout(look, group)
    if look.opened.modality == "text":
        row = shares[-1] if group.causal else shares.mean(0)
    else:
        prefix, grid = look.subject.prefix(len(shares)), look.subject.grid
        if prefix is None or grid is None:
            return [said]
        row = shares[0, prefix:] if prefix else shares.mean(0)
        cells = torch.from_numpy(row.reshape(1, 1, *grid)).float()
        row = functional.adaptive_avg_pool2d(cells, values.shape)[0, 0].numpy()
    if row.shape != values.shape:
        return [said]
    agreed = float(correlate(torch.from_numpy(row[None]), torch.from_numpy(values[None])))
    numbers["correlation_with_rollout"] = agreed
    return [
        f"The rollout of attention correlates with it by {agreed:.2f}, where {ceiling:.2f} is "
        "what a perfect map would reach."
    ]


def _rollout(look: Look, group: Group) -> np.ndarray:
    means: list[Tensor] = []
    run(look, group, lambda a: means.append(a.weights[0].float().mean(0).cpu()))
    return rollout(torch.stack(means)[:, None, None]).shares[0]


def _picture(look: Look, found: Saliency, values: np.ndarray, names: list[str]) -> Any:
    caption = f"Effect of hiding a part, from {found.runs} runs."
    if look.opened.modality == "image" and look.subject.pixels is not None:
        return over_image("saliency", look.subject.pixels, {"effect": values}, caption)
    if look.subject.written and len(found.values) == len(look.subject.written):
        shown = np.maximum(found.values, 0)
        return one_map("saliency", shown, look.subject.written, names, caption)
    short = [name.split(" to ")[0] for name in names]
    return bars("saliency", {"effect": values}, short, caption)
