"""Draws the pictures of docs/lens.md: readers on real models.

Run: REGARD_RESOURCES=FOLDER python docs/figures/lens.py
(ten seconds; FOLDER holds the archives that regard.testing.resources names)
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from regard.lens.cross_attention import cross_attention_maps
from regard.lens.entropy import entropies
from regard.lens.maps import attention_maps, rollout
from regard.lens.sinks import sinks
from regard.lens.speech import word_times
from regard.testing import resources

FIGURES = Path(__file__).parent
SENTENCE = "The cat sat on the mat, and then it slept."
END_OF_TEXT = 50256  # Whisper's; what follows in its vocabulary is no text


def main() -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name in ("minilm", "whisper_tiny", "librivox"):
        if not resources.is_here(name):
            print(f"left out: the resource {name!r} is not here (see regard.testing.resources)")
            return 0
    model, tokenizer = resources.minilm()
    batch = dict(tokenizer([SENTENCE], return_tensors="pt"))
    maps = attention_maps(model, batch)
    maps.picture(FIGURES / "lens_maps.png")
    rollout(torch.from_numpy(maps.weights)).picture(FIGURES / "lens_rollout.png")
    entropies(model, batch).picture(FIGURES / "lens_entropy.png")
    sinks(model, batch, theta=None, alpha=3.0).picture(FIGURES / "lens_sinks.png")

    speech, utterance = resources.whisper_tiny(), resources.librivox()[4]
    features = speech.features([utterance.samples])
    with torch.inference_mode():
        said = [t for t in speech.model.generate(features)[0].tolist() if t < END_OF_TEXT]
    settings = speech.model.generation_config
    prompt = [speech.model.config.decoder_start_token_id, settings.no_timestamps_token_id]
    attention = cross_attention_maps(speech.model, features, torch.tensor([[*prompt, *said]]))
    pieces = [speech.tokenizer.decode([token]) for token in said]
    found = word_times(
        attention[:, :, 1:],  # row 1 predicts the first piece
        pieces,
        resources.WHISPER_ALIGNMENT_HEADS,
        seconds_per_frame=resources.WHISPER_SECONDS_PER_FRAME,
        frames=round(utterance.seconds / resources.WHISPER_SECONDS_PER_FRAME),
    )
    found.picture(FIGURES / "lens_times.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
