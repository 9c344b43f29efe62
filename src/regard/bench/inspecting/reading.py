"""Reading what a model is to look at: a text, a picture or a recording."""

from __future__ import annotations

import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.bench.inspecting.opening import Opened, attempt
from regard.bench.inspecting.pictures import (
    MOST,
    Labelled,
    as_url,
    find_pictures,
    prepared_picture,
    prepared_pictures,
)

NEW_TOKENS = 48  # at most, of what an encoder-decoder writes


@dataclass(frozen=True)
class Subject:
    """An input ready for the model, and how its parts are called.

    `inputs` are the model's keyword arguments, of one input. `words` are the tokens of a text;
    `written` those of the decoder; `grid` rows and columns of an image's patches; `seconds` the
    length of a recording, `span` that of what the model sees. `pictures` are the files of a folder
    of images, of which `inputs` is the first. `notes` say what was changed.
    """

    source: str
    inputs: dict[str, Tensor]
    words: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    grid: tuple[int, int] | None = None
    seconds: float = 0.0
    span: float = 0.0
    thumbnail: str = ""
    pixels: NDArray[np.float32] | None = None
    pictures: list[Labelled] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def prefix(self, tokens: int) -> int | None:
        """Tokens before the patches of an image; None where they are not one per patch."""
        if self.grid is None:
            return None
        before = tokens - self.grid[0] * self.grid[1]
        return before if 0 <= before <= 16 else None

    def names(self, tokens: int, decoder: bool = False) -> list[str]:
        """What the tokens of a layer are called, as far as it can be told."""
        known = self.written if decoder else self.words
        if len(known) == tokens:
            return known
        if decoder:
            return [str(number) for number in range(tokens)]
        prefix = self.prefix(tokens)
        if prefix is not None and self.grid is not None:
            rows, columns = self.grid
            special = ["class", *(f"prefix {n}" for n in range(1, prefix))][:prefix]
            return special + [f"({r}, {c})" for r in range(rows) for c in range(columns)]
        if self.span:
            return [f"{number * self.span / tokens:.2f} s" for number in range(tokens)]
        return [str(number) for number in range(tokens)]

    def heard(self, tokens: int) -> int:
        """How many of the frames belong to the recording, the rest being padding."""
        return min(tokens, int(np.ceil(tokens * self.seconds / self.span))) if self.span else tokens


def read_subject(opened: Opened, given: str, most: int | None = None) -> Subject:
    """The input for the model: a text or a file of one; a picture or a folder; a WAV recording.

    `most` is how many pictures of a folder are taken (default 24).

    Raises:
        ValueError: no such file, one that cannot be read, or an empty text; a folder without
            pictures, or for a model that takes none; `most` without a folder or below 1.
    """
    folder = len(given) < 1024 and Path(given).is_dir()
    if folder and opened.modality != "image":
        raise ValueError(f"INPUT {given} is a folder; those of pictures are read, for image models")
    if most is not None and not folder:
        raise ValueError("--pictures is for an INPUT that is a folder of pictures")
    if most is not None and most < 1:
        raise ValueError(f"--pictures must be at least 1, got {most}")
    if opened.modality == "image":
        found = _image(opened, given, most)
    else:
        found = {"text": _text, "audio": _audio}[opened.modality](opened, given)
    device = next(opened.model.parameters()).device
    found.inputs.update({name: value.to(device) for name, value in found.inputs.items()})
    return _with_decoder(opened, found) if opened.model.config.is_encoder_decoder else found


def _text(opened: Opened, given: str) -> Subject:
    path, source = Path(given), "text"
    text = given
    if len(given) < 1024 and "\n" not in given and path.is_file():
        source = str(path)
        text = attempt(f"INPUT {path} cannot be read as text", lambda: path.read_text("utf-8"))
    elif path.suffix in (".txt", ".md", ".csv", ".json") and " " not in given.strip():
        raise ValueError(f"INPUT {path}: no such file")
    if not text.strip():
        raise ValueError("INPUT is an empty text")
    tokenizer = opened.prepare
    most = min(
        getattr(opened.model.config, "max_position_embeddings", 1 << 30),
        getattr(tokenizer, "model_max_length", 1 << 30),
    )
    whole = tokenizer(text, verbose=False)["input_ids"]
    made = tokenizer(text, truncation=True, max_length=most, return_tensors="pt", verbose=False)
    ids = made["input_ids"][0].tolist()
    if not ids:
        raise ValueError("INPUT has no tokens for this model")
    notes = []
    if len(ids) < len(whole):
        notes.append(f"The text has {len(whole)} tokens; the model takes the first {len(ids)}.")
    inputs = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    return Subject(source, inputs, words=_words(tokenizer, ids), notes=notes)


def _words(tokenizer: Any, ids: list[int]) -> list[str]:
    if tokenizer is None:
        return [str(number) for number in ids]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    # Spaces in the vocabularies of byte-level and SentencePiece models.
    return [str(token).replace("Ġ", "␣").replace("▁", "␣") for token in tokens]


def _image(opened: Opened, given: str, most: int | None) -> Subject:
    given_path, notes = Path(given), []
    config = getattr(opened.model.config, "vision_config", opened.model.config)
    if given_path.is_dir():
        labels = getattr(opened.model.config, "id2label", None) or {}
        pictures, count = find_pictures(given_path, labels, MOST if most is None else most)
        if len(pictures) < count:
            notes.append(f"{len(pictures)} of {count} pictures, evenly chosen (--pictures).")
    else:
        pictures = [Labelled(_file(given))]
    pixels, shown = prepared_picture(opened, pictures[0].path)
    for _ in prepared_pictures(opened, pictures[1:], pixels.shape):
        pass  # before anything is computed, every file is known to be good
    size = getattr(config, "patch_size", None)
    sizes = (size, size) if isinstance(size, int) else size
    grid = None
    if sizes is not None:
        grid = (pixels.shape[2] // sizes[0], pixels.shape[3] // sizes[1])
    return Subject(
        given if given_path.is_dir() else str(given_path),
        {"pixel_values": pixels},
        grid=grid,
        thumbnail=as_url(shown, "png", max(shown.shape)),
        pixels=shown,
        notes=notes,
        pictures=pictures,
    )


def _audio(opened: Opened, given: str) -> Subject:
    path = _file(given)
    samples, rate = attempt(
        f"INPUT {path} cannot be read as a WAV recording", lambda: read_wave(path)
    )
    extractor = opened.prepare
    wanted = int(getattr(extractor, "sampling_rate", 16000))
    notes = []
    if rate != wanted:
        samples = resample(samples, rate, wanted)
        notes.append(f"Resampled from {rate} to {wanted} samples per second.")
    made = extractor(samples, sampling_rate=wanted, return_tensors="pt")
    inputs = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    seconds = span = len(samples) / wanted
    if "input_features" in inputs and hasattr(extractor, "hop_length"):
        span = inputs["input_features"].shape[-1] * extractor.hop_length / wanted
        if span < seconds:
            notes.append(f"The model takes the first {span:.1f} of {seconds:.1f} seconds.")
        seconds = min(seconds, span)
    return Subject(str(path), inputs, seconds=seconds, span=span, notes=notes)


def read_wave(path: Path) -> tuple[NDArray[np.float32], int]:
    """Samples of a PCM recording in -1 ... 1, channels averaged, and how many there are a second.

    Raises:
        ValueError: it is empty, or its samples have another width than 8, 16 or 32 bits.
        wave.Error, EOFError: it is no such file.
    """
    with wave.open(str(path)) as opened:
        width, channels, rate = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
        content = opened.readframes(opened.getnframes())
    if width not in (1, 2, 4):
        raise ValueError(f"its samples have {8 * width} bits; 8, 16 and 32 are read")
    kind = {1: "u1", 2: "<i2", 4: "<i4"}[width]
    values = np.frombuffer(content, kind).astype(np.float64)
    if not len(values):
        raise ValueError("it holds no samples")
    values = (values - 128) / 128 if width == 1 else values / 2.0 ** (8 * width - 1)
    return values.reshape(-1, channels).mean(1).astype(np.float32), rate


def resample(samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """The recording at another rate, by its Fourier series: no frequency folds back.

    >>> wave = np.sin(2 * np.pi * 5 * np.arange(400) / 400).astype(np.float32)
    >>> bool(np.allclose(resample(wave, 400, 200), wave[::2], atol=1e-5))
    True
    """
    count = max(1, round(len(samples) * wanted / rate))
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * (count / len(samples))).astype(np.float32)


def _file(given: str) -> Path:
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"INPUT {path}: no such file")
    return path


def _with_decoder(opened: Opened, subject: Subject) -> Subject:
    """The input with what the model itself writes, which its decoder is then given."""
    model = opened.model
    if not hasattr(model, "generate") or not model.can_generate():
        raise ValueError(f"{type(model).__name__} has a decoder but cannot generate")
    with torch.inference_mode():
        made = attempt(
            f"{type(model).__name__} cannot generate from this input",
            lambda: model.generate(
                **subject.inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1
            ),
        )
    settings = model.generation_config
    start = settings.decoder_start_token_id
    start = model.config.decoder_start_token_id if start is None else start
    ids = made[0].tolist()
    if not ids or ids[0] != start:
        without_times = getattr(settings, "no_timestamps_token_id", None)
        ids = [start, *([] if without_times is None else [without_times]), *ids]
    end = settings.eos_token_id
    if len(ids) > 2 and ids[-1] in (end if isinstance(end, list) else [end]):
        ids = ids[:-1]
    device = next(model.parameters()).device
    subject.inputs["decoder_input_ids"] = torch.tensor([ids], device=device)
    subject.written.extend(_words(opened.tokenizer, ids))
    return subject
