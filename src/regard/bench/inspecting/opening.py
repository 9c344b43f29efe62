"""Opening a model of transformers from a folder, and telling what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from regard.lens.inputs import require

Modality = Literal["text", "image", "audio"]
MODALITIES: dict[str, Modality] = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_features": "audio",
    "input_values": "audio",
}
WEIGHTS = ("*.safetensors", "*.bin")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Opened:
    """A model in evaluation mode with what prepares its input.

    `prepare` is its tokenizer, image processor or feature extractor; `tokenizer` that of what it
    writes, None if the folder has none; `missing` names weights that the files lack.
    """

    folder: Path
    model: Any
    modality: Modality
    prepare: Any
    tokenizer: Any
    missing: list[str]


def open_model(folder: Path, device: str = "cpu") -> Opened:
    """The model of a folder, as `save_pretrained` writes it: nothing is downloaded or executed.

    The class is the one that `config.json` names, of transformers itself. Needs the extra `hf`.

    Raises:
        ValueError: no such folder, no config.json, no weights, a model of another kind, or no
            tokenizer, image processor or feature extractor beside it. ImportError: no transformers.
    """
    if not folder.is_dir():
        raise ValueError(f"MODEL_DIR {folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"MODEL_DIR {folder} has no config.json: no model of transformers")
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(f"MODEL_DIR {folder} has no weights (*.safetensors or *.bin)")
    transformers = require("transformers", "hf")
    with quiet(transformers):
        config = _loaded(transformers.AutoConfig, folder, "config.json")
        names = config.architectures or []
        kind = getattr(transformers, names[0], None) if names else None
        options = {"output_loading_info": True}
        model, told = _loaded(kind or transformers.AutoModel, folder, "the model", **options)
        modality = MODALITIES.get(getattr(model, "main_input_name", ""))
        if modality is None:
            raise ValueError(
                f"{type(model).__name__} takes {getattr(model, 'main_input_name', 'unknown')}; "
                f"inspected are models that take one of {', '.join(MODALITIES)}"
            )
        what = {
            "text": ("AutoTokenizer", "a tokenizer"),
            "image": ("AutoImageProcessor", "an image processor (preprocessor_config.json)"),
            "audio": ("AutoFeatureExtractor", "a feature extractor (preprocessor_config.json)"),
        }
        name, words = what[modality]
        prepare = _loaded(getattr(transformers, name), folder, words)
        tokenizer = prepare if modality == "text" else None
        if modality != "text" and (folder / "tokenizer_config.json").is_file():
            tokenizer = _loaded(transformers.AutoTokenizer, folder, "a tokenizer")
    missing = sorted(told["missing_keys"])
    return Opened(folder, model.eval().to(device), modality, prepare, tokenizer, missing)


def _loaded(kind: Any, folder: Path, words: str, **options: Any) -> Any:
    local: dict[str, Any] = {"local_files_only": True}
    if kind.__name__.startswith("Auto"):  # else a class of transformers itself
        local["trust_remote_code"] = False
    try:
        return kind.from_pretrained(folder, **local, **options)
    # Whatever a broken file makes of itself in there, it is the folder that is wrong.
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"MODEL_DIR {folder}: cannot load {words} ({type(error).__name__}: {said[0]})"
        ) from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no advice of transformers while it is open."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def attempt(words: str, function: Callable[[], Made]) -> Made:
    """What the function returns; whatever goes wrong in it as a ValueError that begins so."""
    try:
        return function()
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        raise ValueError(f"{words} ({type(error).__name__}: {said[0]})") from error
