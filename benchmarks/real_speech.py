"""Whisper tiny.en on five LibriVox sentences: does cross-attention tell what the model heard?

Run: REGARD_RESOURCES=FOLDER python benchmarks/real_speech.py [--runs N]
(a quarter of an hour on one thread; FOLDER holds the archives that regard.testing.resources names)
Writes results/real_speech.json, from which docs/real_models.md is made, and its pictures.

The encoder sees 8 s, where Whisper would pad to 30 s: its table of positions is cut (cut to the
recording itself it would stammer). Only the recording is hidden and compared, not the padding. Per
sentence: word times from the published alignment heads against the known ones; correlation of
cross-attention with the saliency of the spectrogram (SLIC superpixels, antithetic pairs, occluded
by zero and by the quietest value) and of the encoder's output; gradients; and deletion curves.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from regard.core.state import write_atomically
from regard.lens.agreement import agreement, correlate, normalise_map, pool_saliency
from regard.lens.cross_attention import aggregate, cross_attention_maps
from regard.lens.deletion import deletion_curve, word_error_rate
from regard.lens.forced import encoder_output_saliency, input_saliency
from regard.lens.gradients import gradient_saliency
from regard.lens.occlusion_masks import random_masks, slic_masks
from regard.lens.records import drawing, plain
from regard.lens.speech import alignment_matrix, word_times
from regard.testing import resources

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"
FRAME = resources.WHISPER_SECONDS_PER_FRAME
CONTEXT = 400  # frames that the encoder sees
METHODS = ("gradient", "input_x_gradient")


def shortened(frames: int, *, attention: str = "sdpa") -> resources.SpeechModel:
    """Whisper whose encoder sees `frames` frames instead of 1500."""
    speech = resources.whisper_tiny(attention=attention)
    encoder = speech.model.model.encoder
    speech.model.config.max_source_positions = encoder.max_source_positions = frames
    table = encoder.embed_positions.weight[:frames].detach().clone()
    encoder.embed_positions = nn.Embedding.from_pretrained(table)
    return speech


def words(text: str) -> list[str]:
    """Lower case without punctuation; "Mr." as it is spoken."""
    text = text.lower().replace("mr.", "mister").replace("-", " ")
    return re.sub(r"[^a-z' ]", "", text).split()


def alignment(weights: Tensor, pieces: list[str], utterance: resources.Utterance) -> dict[str, Any]:
    """Errors of the times of words that were heard right, in seconds."""
    heads = resources.WHISPER_ALIGNMENT_HEADS
    told = word_times(weights, pieces, heads, seconds_per_frame=FRAME)
    spans = []
    for text, start, end in zip(told.words, told.start, told.end, strict=True):
        parts = words(text)
        for i, part in enumerate(parts):  # a hyphenated word is several of the reference
            width = (end - start) / len(parts)
            spans.append((part, start + i * width, start + (i + 1) * width))
    known = [(word.text, word.start, word.end) for word in utterance.words]
    matcher = difflib.SequenceMatcher(None, [s[0] for s in spans], [k[0] for k in known], False)
    pairs = [
        (spans[block.a + i], known[block.b + i])
        for block in matcher.get_matching_blocks()
        for i in range(block.size)
    ]
    centre = [abs((a[1] + a[2]) - (b[1] + b[2])) / 2 for a, b in pairs]
    start = [abs(a[1] - b[1]) for a, b in pairs]
    overlap = [a[1] < b[2] and b[1] < a[2] for a, b in pairs]
    return {
        "words": len(known), "matched": len(pairs), "spans": spans, "known": known,
        "start_error": start, "centre_error": centre, "overlap": overlap,
    }  # fmt: skip


def sentence(utterance: resources.Utterance, runs: int, seed: int) -> tuple[dict[str, Any], Any]:
    """All measurements of one recording, and the maps for its picture."""
    frames = int(np.ceil(utterance.seconds / FRAME))  # of the recording
    speech = shortened(CONTEXT)
    model, tokenizer = speech.model, speech.tokenizer
    inputs = speech.features([utterance.samples])[..., : 2 * CONTEXT]
    config = model.config
    with torch.inference_mode():
        said = [
            token
            for token in model.generate(inputs, max_new_tokens=80)[0].tolist()
            if token < 50256
        ]
    hypothesis = tokenizer.decode(said)
    full = resources.whisper_tiny()
    with torch.inference_mode():
        whole = full.model.generate(full.features([utterance.samples]))[0]
    prompt = [config.decoder_start_token_id, model.generation_config.no_timestamps_token_id]
    tokens = torch.tensor([[*prompt, *said]])
    rows = range(1, 1 + len(said))  # row 1 predicts the first token of the text
    start = time.process_time()
    everywhere = cross_attention_maps(model, inputs, tokens)
    weights = everywhere[..., :frames]
    attention_seconds = time.process_time() - start
    pieces = [tokenizer.decode([token]) for token in said]
    found: dict[str, Any] = {
        "name": utterance.name, "seconds": utterance.seconds, "frames": frames,
        "reference": utterance.text, "hypothesis": hypothesis,
        "hypothesis_30_s": tokenizer.decode(whole, skip_special_tokens=True), "tokens": len(said),
        "word_error_rate": word_error_rate(words(utterance.text), words(hypothesis)),
        "alignment": alignment(weights[:, :, 1:], pieces, utterance),
        "mass_on_recording": float(weights.sum(-1).mean()),
        "rows_sum_to_one": float((everywhere.sum(-1) - 1).abs().max()),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    spare = torch.ones(1)  # what is never hidden
    masks = random_masks(4 * runs, (frames,), antithetic=True, generator=generator)
    masks = torch.cat([masks, spare.expand(len(masks), CONTEXT - frames)], dim=-1)
    start = time.process_time()
    memory = encoder_output_saliency(model, inputs, tokens, masks)
    seconds = {"attention": attention_seconds, "encoder_output": time.process_time() - start}
    maps: dict[str, Tensor] = {"encoder_output": torch.from_numpy(memory.values[..., :frames])}
    found["encoder_output"] = compared(
        weights, maps["encoder_output"], memory.halves[..., :frames], rows
    )
    masks = slic_masks(inputs[0, :, : 2 * frames], runs, antithetic=True, generator=generator)
    masks = torch.cat([masks, spare.expand(*masks.shape[:2], 2 * (CONTEXT - frames))], dim=-1)
    pooled: dict[str, Tensor] = {}
    for name, fill in (("input_zero", 0.0), ("input_minimum", "minimum")):
        start = time.process_time()
        saliency = input_saliency(model, inputs, tokens, masks, fill=fill)
        seconds[name] = time.process_time() - start
        maps[name] = torch.from_numpy(saliency.values[..., : 2 * frames])
        pooled[name] = pool_saliency(maps[name], frames)
        halves = torch.stack([pool_saliency(h[..., : 2 * frames], frames) for h in saliency.halves])
        found[name] = compared(weights, pooled[name], halves, rows)
        found[name]["mean_pooling"] = agreement(
            weights, pool_saliency(maps[name], frames, mode="mean"), rows=rows
        ).all
    for method in METHODS:
        start = time.process_time()
        gradient = gradient_saliency(model, inputs, tokens, method=method)
        seconds[method] = time.process_time() - start
        map_ = pool_saliency(torch.from_numpy(gradient.values[..., : 2 * frames]), frames)
        found[method] = compared(weights, map_, None, rows)
        chosen = list(rows)
        found[method]["with_input_zero"] = float(
            correlate(normalise_map(map_)[chosen], normalise_map(pooled["input_zero"])[chosen])
        )
    found["deletion"] = deletions(speech, inputs, utterance, weights, maps, list(rows))
    found["cpu_seconds"] = seconds
    return found, (weights, pooled, maps, pieces, utterance)


def compared(weights: Tensor, values: Any, halves: Any, rows: range) -> dict[str, Any]:
    """Agreement by both correlations, and of the alignment heads alone."""
    both = {
        kind: plain(agreement(weights, values, halves=halves, kind=kind, rows=rows))
        for kind in ("pearson", "spearman")
    }
    chosen = normalise_map(aggregate(weights, pairs=resources.WHISPER_ALIGNMENT_HEADS))
    wanted = normalise_map(torch.as_tensor(values))
    return {**both, "alignment_heads": float(correlate(chosen, wanted, rows=list(rows)))}


def deletions(
    speech: resources.SpeechModel,
    inputs: Tensor,
    utterance: resources.Utterance,
    weights: Tensor,
    maps: dict[str, Tensor],
    rows: list[int],
) -> dict[str, Any]:
    """Word error rate when what a map calls important is set to zero."""

    def score(kept: Tensor) -> float:
        with torch.inference_mode():
            hidden = torch.cat([recorded * kept, padding], dim=-1)
            heard = speech.model.generate(hidden, max_new_tokens=60)[0]
        heard = speech.tokenizer.decode(heard, skip_special_tokens=True)
        return word_error_rate(words(utterance.text), words(heard))

    bands, frames = inputs.shape[1], weights.shape[-1]
    recorded, padding = inputs[..., : 2 * frames], inputs[..., 2 * frames :]
    flat = normalise_map(weights.mean((0, 1)))[rows].mean(0)
    noise = torch.Generator().manual_seed(0)
    sentence_maps = {
        "attention": flat.repeat_interleave(2)[None].expand(bands, -1),
        "input_zero": normalise_map(maps["input_zero"])[rows].mean(0),
        "chance": torch.rand(bands, 2 * frames, generator=noise),
    }
    return {
        name: plain(deletion_curve(map_, score, percent=range(0, 101, 10)))
        for name, map_ in sentence_maps.items()
    }


def summary(sentences: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the sentences."""
    heads = {}
    for name in ("encoder_output", "input_zero", "input_minimum", *METHODS):
        told = [s[name]["pearson"] for s in sentences]
        heads[name] = {
            "all": float(np.mean([t["all"] for t in told])),
            "spearman": float(np.mean([s[name]["spearman"]["all"] for s in sentences])),
            "alignment_heads": float(np.mean([s[name]["alignment_heads"] for s in sentences])),
            "layer": np.mean([t["layer"] for t in told], 0),
            "best_head": float(np.mean([np.max(t["head"]) for t in told])),
            "median_head": float(np.mean([np.median(t["head"]) for t in told])),
            "token_mean": float(np.mean([np.mean(t["token"]) for t in told])),
        }
        if told[0]["ceiling"] is not None:
            heads[name]["ceiling"] = float(np.mean([t["ceiling"] for t in told]))
    joined = [s["alignment"] for s in sentences]
    start = np.concatenate([a["start_error"] for a in joined])
    centre = np.concatenate([a["centre_error"] for a in joined])
    return {
        "agreement": heads,
        "alignment": {
            "words": sum(a["words"] for a in joined), "matched": len(start),
            "median_start_error": float(np.median(start)), "mean_start_error": float(start.mean()),
            "within_0.1_s": float((start <= 0.1).mean()),
            "within_0.2_s": float((start <= 0.2).mean()),
            "median_centre_error": float(np.median(centre)),
            "overlap": float(np.concatenate([a["overlap"] for a in joined]).mean()),
        },
        "deletion_area": {
            name: float(np.mean([s["deletion"][name]["area"] for s in sentences]))
            for name in sentences[0]["deletion"]
        },
        "word_error_rate": float(np.mean([s["word_error_rate"] for s in sentences])),
    }  # fmt: skip


def pictures(folder: Path, told: list[tuple[dict[str, Any], Any]]) -> None:
    """The maps of the shortest sentence, and correlations per head of all."""
    found, (weights, pooled, maps, pieces, utterance) = min(told, key=lambda t: t[0]["seconds"])
    rows = {
        "alignment heads": alignment_matrix(weights[:, :, 1:], resources.WHISPER_ALIGNMENT_HEADS),
        "mean of all cross-attention": normalise_map(weights.mean((0, 1)))[1:],
        "saliency of the encoder's output": normalise_map(maps["encoder_output"])[1:],
        "saliency of the spectrogram": normalise_map(pooled["input_zero"])[1:],
    }
    seconds = found["frames"] * FRAME
    with drawing(folder / "real_speech_maps.png", (8, 11), len(rows)) as axes:
        for axis, (title, values) in zip(axes[:, 0], rows.items(), strict=True):
            count = len(pieces)
            axis.imshow(
                values[:count].numpy(),
                aspect="auto",
                extent=(0, seconds, count - 0.5, -0.5),
                vmin=-1,
                vmax=5,
            )
            for word in utterance.words:
                axis.axvline(word.start, color="white", linewidth=0.5, alpha=0.6)
            axis.set_yticks(range(count), [piece.strip() for piece in pieces], fontsize=7)
            axis.set_title(f"{title} (lines: known starts of words)", fontsize=9)
        axes[-1, 0].set_xlabel("seconds")
    names = ("encoder_output", "input_zero")
    with drawing(folder / "real_speech_heads.png", (9, 3), 1, 2) as axes:
        for axis, name in zip(axes[0], names, strict=True):
            head = np.mean([s[name]["pearson"]["head"] for s, _ in told], 0)
            layer = np.mean([s[name]["pearson"]["layer"] for s, _ in told], 0)
            grid = np.concatenate([head, layer[:, None]], 1)
            axis.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
            for (row, column), value in np.ndenumerate(grid):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
            axis.set_xticks(range(7), [*map(str, range(6)), "mean"])
            axis.set_yticks(range(4))
            axis.set(xlabel="head", ylabel="layer", title=f"attention and {name.replace('_', ' ')}")


def measured(number: int, runs: int) -> tuple[dict[str, Any], Any]:
    """One sentence, in a process of its own."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = sentence(resources.librivox()[number], runs, seed=number)
    print(found[0]["name"], found[0]["hypothesis"])
    for name in ("encoder_output", "input_zero", "input_minimum"):
        told = found[0][name]["pearson"]
        print(f"  {name}: {told['all']:.3f}, ceiling {told['ceiling']:.3f}")
    sys.stdout.flush()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--runs",
        type=int,
        default=300,
        help="runs with hidden input; 4 N with hidden encoder output",
    )
    parser.add_argument("--sentences", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="sentences measured side by side")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_speech.json")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args()
    for name in ("whisper_tiny", "librivox"):
        if not resources.is_here(name):
            print(f"left out: the resource {name!r} is not here (see regard.testing.resources)")
            return 0
    numbers = range(len(resources.librivox()))[: options.sentences]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        told = list(pool.map(measured, numbers, [options.runs] * len(numbers)))
    result = {
        "runs": options.runs,
        "torch": torch.__version__,
        "summary": summary([found for found, _ in told]),
        "sentences": [found for found, _ in told],
    }
    text = json.dumps(plain(result), indent=1)
    write_atomically(options.out, (text + "\n").encode())
    pictures(options.figures, told)
    print(json.dumps(plain(result["summary"]), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
