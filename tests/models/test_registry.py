"""Models by name; saved and read again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import regard
from models.subjects import MIXERS, decoder, ids
from regard.models import Decoder, Pretrained, files, names, published

TINY = {"dim": 8, "heads": 2, "layers": 1, "vocabulary": 5}


def test_names_are_the_models():
    assert names() == tuple(published) == tuple(sorted(names()))
    assert {"mesanet", "parallax"} <= set(names())
    for name in names():
        variant = published[name]
        assert re.match(r"[A-Z].*\.$", variant.summary)
        assert variant.paper.arxiv
        assert issubclass(variant.model, Pretrained)
        assert isinstance(variant.config(), variant.model.CONFIG)


def test_an_unknown_name_or_size_is_refused_with_the_nearest():
    with pytest.raises(KeyError, match="no model is called 'mesnet'; did you mean 'mesanet'"):
        regard.create_model("mesnet")
    with pytest.raises(TypeError, match=r"create_model: sizes .*got 'vocabulry'; did you mean"):
        regard.create_model("mesanet", vocabulry=3)
    with pytest.raises(ValueError, match="create_model: dtype must be None or one of"):
        regard.create_model("mesanet", dtype=torch.int64, **TINY)
    with pytest.raises(ValueError, match="DecoderConfig: layers must be an int of at least 1"):
        regard.create_model("mesanet", **{**TINY, "layers": 0})


def test_the_page_lists_them():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*?\| (\d+) M \|", page, re.M)
    assert sorted(name for name, _ in rows) == list(names())
    for name, millions in rows:
        parameters = regard.create_model(name, device="meta").parameters()
        assert round(sum(parameter.numel() for parameter in parameters) / 1e6) == int(millions)


def test_device_and_dtype():
    model = regard.create_model("parallax", device="meta", dtype=torch.bfloat16, **TINY)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.embed.weight.dtype == torch.bfloat16
    assert model(torch.zeros(1, 3, dtype=torch.int64, device="meta")).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MIXERS)
def test_saved_and_read_again(name, tmp_path):
    model = decoder(name, dtype=torch.float32)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = Decoder.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert torch.equal(again(ids(2, 6)), model(ids(2, 6)))
    double = Decoder.from_pretrained(tmp_path / "new" / "folder", dtype=torch.float64)
    assert {parameter.dtype for parameter in double.parameters()} == {torch.float64}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = decoder("mesa", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(tensors, path, header):
        path.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        decoder("softmax", dtype=torch.float32).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def altered(tmp_path, change=None, **header):
    """The file of a model with another header or other tensors."""
    decoder("mesa", dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = {**file.metadata(), **header}
    if change is not None:
        change(tensors)
    save_file(tensors, path, {name: text for name, text in found.items() if text is not None})
    return tmp_path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": None}, "must be a regard.model/1 file, got no format"),
        ({"format": "regard.model/9"}, "must be a regard.model/1 file, got regard.model/9"),
        ({"kind": "vision"}, "must hold a decoder, got vision"),
        ({"config": "{"}, "is damaged"),
        ({"config": None}, "is damaged"),
        ({"config": json.dumps({"mixers": [], "colour": 3})}, "is damaged"),
        ({"config": json.dumps({"mixers": [{"kind": "mesh", "options": {}}]})}, "is damaged"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Decoder.from_pretrained(altered(tmp_path, **header))


def test_a_file_without_a_tensor_is_refused(tmp_path):
    folder = altered(tmp_path, lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(ValueError, match=r"no norm\.weight"):
        Decoder.from_pretrained(folder)
    (folder / files.FILE).write_bytes(b"junk")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Decoder.from_pretrained(folder)
    with pytest.raises(FileNotFoundError):
        Decoder.from_pretrained(folder / "gone")
