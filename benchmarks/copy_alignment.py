"""A small speech-like model whose alignment is known: what cross-attention and saliency say of it.

Run: python benchmarks/copy_alignment.py          (two minutes on one thread)
Writes results/copy_alignment.json, from which docs/cross_attention.md is made, and its picture.

"Sounds" are fixed spectra that last 6 to 14 frames each, in noise; a Whisper of two and two layers
learns to write down which it hears. For unseen sequences: the correlation of cross-attention with
the saliency of the encoder's output and of the spectrogram, and how much of a token's attention,
or saliency above the median, lies on the frames in which its sound is heard.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from regard.core.state import write_atomically
from regard.lens.agreement import agreement, normalise_map, pool_saliency
from regard.lens.cross_attention import cross_attention, value_weighted
from regard.lens.forced import encoder_output_saliency, input_saliency
from regard.lens.occlusion_masks import random_masks
from regard.lens.records import drawing, plain

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"
SOUNDS, BANDS, FRAMES, LENGTH = 12, 8, 100, 8
PAD, START, END, FIRST = 0, 1, 2, 3


def sequences(
    count: int, spectra: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, list[list[tuple[int, int]]]]:
    """Spectrograms [N, bands, frames], tokens [N, LENGTH + 2], and the frames of every sound."""
    sounds = torch.randint(SOUNDS, (count, LENGTH), generator=generator)
    lasts = torch.randint(6, 15, (count, LENGTH), generator=generator)
    clean = torch.zeros(count, BANDS, FRAMES)
    spans = []
    for row in range(count):
        at, mine = int(torch.randint(0, 5, (), generator=generator)), []
        for sound, length in zip(sounds[row].tolist(), lasts[row].tolist(), strict=True):
            until = min(at + length, FRAMES)
            clean[row, :, at:until] = spectra[sound][:, None]
            mine.append((at, until))
            at = until
        spans.append(mine)
    noise = torch.randn(clean.shape, generator=generator)
    tokens = torch.full((count, LENGTH + 2), END)
    tokens[:, 0] = START
    for row, mine in enumerate(spans):  # a sound that had no room is not written
        heard = [i for i, (start, stop) in enumerate(mine) if stop - start >= 4]
        tokens[row, 1 : 1 + len(heard)] = sounds[row, heard] + FIRST
        tokens[row, 2 + len(heard) :] = PAD
        spans[row] = [mine[i] for i in heard]
    return clean + 0.3 * noise, tokens, spans


def trained(spectra: Tensor, steps: int, seed: int) -> tuple[Any, float]:
    """The model, and the share of tokens of unseen sequences that it gets right."""
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        vocab_size=FIRST + SOUNDS, num_mel_bins=BANDS, d_model=48, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=FRAMES // 2,
        max_target_positions=LENGTH + 4, pad_token_id=PAD, bos_token_id=START, eos_token_id=END,
        decoder_start_token_id=START, suppress_tokens=[], begin_suppress_tokens=[], dropout=0.0,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)

    def loss_and_right(count: int) -> tuple[Tensor, Tensor]:
        spectrograms, tokens, _ = sequences(count, spectra, generator)
        given, wanted = tokens[:, :-1], tokens[:, 1:]
        logits = model(input_features=spectrograms, decoder_input_ids=given).logits
        real = wanted != PAD
        loss = torch.nn.functional.cross_entropy(logits[real], wanted[real])
        return loss, (logits.argmax(-1) == wanted)[real].double().mean()

    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss, _ = loss_and_right(32)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return model.eval(), float(loss_and_right(256)[1])


def on_the_sound(values: Tensor, spans: list[tuple[int, int]]) -> float:
    """Mean share of rows' mass on the encoder's frames of their sounds."""
    shares = []
    for row, (start, stop) in zip(values, spans, strict=True):
        shares.append(float(row[start // 2 : -(-stop // 2)].sum() / row.sum().clamp(min=1e-12)))
    return float(np.mean(shares))


def measured(model: Any, spectra: Tensor, count: int, runs: int) -> tuple[dict[str, Any], Any]:
    """Agreement and mass, as means over unseen sequences; maps of the last one."""
    generator = torch.Generator().manual_seed(2026)
    spectrograms, tokens, spans = sequences(count, spectra, generator)
    told: dict[str, list[Any]] = {"encoder_output": [], "input": []}
    mass: dict[str, list[float]] = {}
    for row in range(count):
        heard = len(spans[row])
        given = tokens[row : row + 1, : heard + 1]  # row i says what follows: sounds, then the end
        spectrogram = spectrograms[row : row + 1]
        found = cross_attention(model, spectrogram, given)
        weights = torch.from_numpy(found.weights)
        weighted = value_weighted(weights, torch.from_numpy(found.values))
        masks = random_masks(runs, (FRAMES // 2,), antithetic=True, generator=generator)
        memory = encoder_output_saliency(model, spectrogram, given, masks, batch_size=128)
        masks = random_masks(runs, (BANDS, FRAMES), antithetic=True, generator=generator)
        saliency = input_saliency(model, spectrogram, given, masks, batch_size=128)
        pooled = pool_saliency(torch.from_numpy(saliency.values), FRAMES // 2)
        halves = [pool_saliency(torch.from_numpy(half), FRAMES // 2) for half in saliency.halves]
        maps = {
            "encoder_output": (torch.from_numpy(memory.values), torch.from_numpy(memory.halves)),
            "input": (pooled, torch.stack(halves)),
        }
        for name, (values, both) in maps.items():
            agrees = agreement(weights, values, halves=both)
            told[name].append({**plain(agrees), "weighted": agreement(weighted, values).all})
        everything = {
            "attention": weights.mean((0, 1)), "value_weighted": weighted.mean((0, 1)),
            "encoder_output": maps["encoder_output"][0], "input": pooled,
        }  # fmt: skip
        for name, values in everything.items():
            if name in maps:  # noise lifts every frame of a saliency
                values = (values - values.median(-1, keepdim=True).values).clamp(min=0)
            mass.setdefault(name, []).append(on_the_sound(values[:heard], spans[row]))
        mass.setdefault("chance", []).append(
            float(np.mean([(stop - start) / FRAMES for start, stop in spans[row]]))
        )
    summary = {
        name: {
            "all": np.mean([t["all"] for t in rows]),
            "value_weighted": np.mean([t["weighted"] for t in rows]),
            "layer": np.mean([t["layer"] for t in rows], 0),
            "best_head": np.mean([np.max(t["head"]) for t in rows]),
            "median_head": np.mean([np.median(t["head"]) for t in rows]),
            "ceiling": np.mean([t["ceiling"] for t in rows]),
        }
        for name, rows in told.items()
    }
    return (
        {"agreement": summary, "on_the_sound": {k: np.mean(v) for k, v in mass.items()}},
        (spectrogram[0], everything, spans[-1]),
    )


def picture(path: Path, maps: Any) -> None:
    """The last sequence: its spectrogram, and what every token is said to depend on."""
    spectrogram, everything, spans = maps
    titles = {
        "attention": "mean of all cross-attention",
        "encoder_output": "saliency of the encoder's output",
        "input": "saliency of the spectrogram, pooled",
    }
    with drawing(path, (8, 7.5), 4) as axes:
        axes[0, 0].imshow(spectrogram.numpy(), aspect="auto", origin="lower")
        axes[0, 0].set_title("spectrogram", fontsize=9)
        for axis, (name, title) in zip(axes[1:, 0], titles.items(), strict=True):
            values = normalise_map(everything[name])[: len(spans)].numpy()
            axis.imshow(values, aspect="auto", vmin=-1, vmax=5)
            for row, (start, stop) in enumerate(spans):
                edges = np.array([start, stop]) / 2 - 0.5
                axis.plot(edges, [row, row], color="white", linewidth=1.5)
            axis.set(ylabel="token")
            axis.set_title(f"{title} (lines: where its sound is)", fontsize=9)
        axes[-1, 0].set_xlabel("frame of the encoder")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="how many models are trained")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "copy_alignment.json")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    spectra = torch.randn(SOUNDS, BANDS, generator=torch.Generator().manual_seed(0))
    begun, told, maps = time.process_time(), [], None
    for seed in range(options.seeds):
        model, right = trained(spectra, options.steps, seed)
        found, maps = measured(model, spectra, options.sequences, options.runs)
        told.append({"seed": seed, "right": right, **found})
        print(json.dumps(plain(told[-1])))
    result = {
        "steps": options.steps, "sequences": options.sequences, "runs": options.runs,
        "torch": torch.__version__, "models": told, "cpu_seconds": time.process_time() - begun,
    }  # fmt: skip
    write_atomically(options.out, (json.dumps(plain(result), indent=1) + "\n").encode())
    picture(options.figures / "copy_alignment.png", maps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
