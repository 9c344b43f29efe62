"""`regard inspect` from the outside: text, image and audio models, exit codes, files."""

from __future__ import annotations

import base64
import json
import os
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cli import tiny_folders as tiny
from regard.bench.inspecting.reading import read_wave, resample
from regard.cli import app
from regard.lens.maps import attention_maps
from regard.lens.pruning import head_gates
from regard.lens.sinks import sinks
from regard.testing import resources

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    makers: dict[str, Any] = {
        "text": tiny.text_classifier,
        "causal": tiny.language_model,
        "image": tiny.vision_classifier,
        "audio": tiny.speech_model,
    }
    for name in makers:
        (root / name).mkdir()
    tiny.picture(root / "noise.png")
    tiny.recording(root / "tone.wav")
    return {name: make(root / name, transformers) for name, make in makers.items()} | {
        "picture": root / "noise.png",
        "recording": root / "tone.wav",
    }


def run(folder: Path, *arguments: str | Path) -> Result:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    finally:
        os.chdir(before)


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


FILES = ("--out", "out.html", "--json", "out.json", "--runs", "8")


def test_text(models: dict[str, Path], tmp_path: Path) -> None:
    done = run(tmp_path, models["text"], "The cat sat on the mat.", *FILES)
    assert done.exit_code == 0, done.output
    assert "BertForSequenceClassification from" in done.stdout
    assert "self-attention of 2 layers and 2 heads" in done.stdout
    assert "Input: text of 9 tokens." in done.stdout
    assert "The class probabilities depend most on" in done.stdout
    assert "\x1b" not in done.output
    assert "Report: out.html\nNumbers: out.json" in done.stdout
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    for title in ("Sinks: self-attention", "Heads: self-attention", "Saliency"):
        assert f"<h2>{title}</h2>" in page
    assert "http" not in page.replace("http://www.w3.org", ""), "it opens offline"
    found = numbers(tmp_path)
    assert found["complete"] is True
    model = transformers.BertForSequenceClassification.from_pretrained(models["text"]).eval()
    ids = torch.tensor([[2, 9, 6, 7, 8, 9, 10, 11, 3]])
    maps = attention_maps(model, {"input_ids": ids}).weights[:, 0]
    np.testing.assert_allclose(found["sections"]["Maps: self-attention"]["maps"], maps, rtol=1e-4)
    told = sinks(model, {"input_ids": ids})
    assert found["sections"]["Sinks: self-attention"]["tokens"][:2] == ["[CLS]", "the"]
    mass = found["sections"]["Sinks: self-attention"]["mass"]
    np.testing.assert_allclose(mass, told.mass, rtol=1e-4)
    importance = found["sections"]["Heads: self-attention"]["importance, bits"]
    assert np.shape(importance) == (2, 2)
    assert np.min(importance) > 0
    assert np.shape(found["sections"]["Saliency"]["effect"]) == (1, 9)
    assert sorted(os.listdir(tmp_path)) == ["out.html", "out.json"]


def test_text_from_a_file_and_chosen_layers(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("a cat " * 20)
    done = run(
        tmp_path, models["text"], "story.txt", *FILES,
        "--what", "maps,heads", "--layers", "1", "--heads", "0",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "The text has 42 tokens; the model takes the first 16." in done.stdout
    found = numbers(tmp_path)
    assert list(found["sections"]) == ["Heads: self-attention", "Maps: self-attention"]
    assert np.shape(found["sections"]["Maps: self-attention"]["maps"]) == (1, 1, 16, 16)
    assert found["sections"]["Heads: self-attention"]["layers"] == [1]


def test_language_model(models: dict[str, Path], tmp_path: Path) -> None:
    done = run(tmp_path, models["causal"], "the cat sat", *FILES)
    assert done.exit_code == 0, done.output
    assert "5 queries, 5 keys, causal." in done.stdout
    assert "The next token depends most on" in done.stdout
    assert "Importance was not measured: the model gives no class probabilities" in done.stdout
    found = numbers(tmp_path)["sections"]
    assert np.shape(found["Maps: self-attention"]["maps"]) == (2, 4, 5, 5)
    assert np.triu(found["Maps: self-attention"]["rollout"], 1).max() == 0


def test_image(models: dict[str, Path], tmp_path: Path) -> None:
    done = run(tmp_path, models["image"], models["picture"], *FILES)
    assert done.exit_code == 0, done.output
    assert "4 x 4 patches" in done.stdout
    found = numbers(tmp_path)["sections"]
    heads = found["Heads: self-attention"]
    assert np.shape(heads["distance, patches"]) == np.shape(heads["patterns"]) == (2, 3)
    assert np.shape(heads["importance, bits"]) == (2, 3)
    assert found["Sinks: self-attention"]["tokens"][:2] == ["class", "(0, 0)"]
    assert np.shape(found["Saliency"]["effect"]) == (1, 4, 4)
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.count("<img") == 7
    assert page.count('id="explorer"') == 1
    assert 'alt="The input"' in page


def test_a_folder_of_pictures(models: dict[str, Path], tmp_path: Path) -> None:
    """Pictures in subfolders named for classes; what the page holds is what the model answers."""
    for number, name in enumerate(("LABEL_3", "label_0", "2")):
        (tmp_path / "many" / name).mkdir(parents=True)
        for more in range(2):
            tiny.picture(tmp_path / "many" / name / f"{more}.png", seed=2 * number + more)
    (tmp_path / "many" / "notes.txt").write_text("no picture")
    done = run(tmp_path, models["image"], "many", *FILES, "--pictures", "4")
    assert done.exit_code == 0, done.output
    assert "Input: many, 4 pictures of 4 x 4 patches." in done.stdout
    assert "4 of 6 pictures, evenly chosen (--pictures)." in done.stdout
    found = numbers(tmp_path)
    assert found["what"] == ["heads"]
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="explored">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert [picture["label"] for picture in data["pictures"]] == [2, 3, 3, 0]
    model = transformers.ViTForImageClassification.from_pretrained(models["image"]).eval()
    processor = tiny.processor(transformers, 16)
    answers = data["answers"]
    files = [tmp_path / "many" / name for name in ("2/0.png", "LABEL_3/0.png")]
    assert data["pictures"][1]["name"] == "0.png"

    def stored(name: str, *shape: int) -> np.ndarray:
        values = np.frombuffer(base64.b64decode(answers[name]), "<f4")
        return values.reshape(4, *shape, 5)

    order, counts = answers["order"], answers["counts"]
    for place, file in enumerate(files):
        pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad(), head_gates(model) as gates:
            for off, kept in [
                ([], stored("whole")[place]),
                ([(1, 2)], stored("without", 2, 3)[place, 1, 2]),
                ([(0, 0), (0, 1), (0, 2)], stored("withoutLayer", 2)[place, 0]),
                (order[:4], stored("inOrder", len(counts))[place, counts.index(4)]),
            ]:
                gates.fill_(1)
                for layer, head in off:
                    gates[layer, head] = 0
                wanted = model(pixels).logits[0, answers["numbers"]]
                np.testing.assert_allclose(kept, wanted, atol=1e-5)


def test_audio(models: dict[str, Path], tmp_path: Path) -> None:
    done = run(tmp_path, models["audio"], models["recording"], *FILES)
    assert done.exit_code == 0, done.output
    assert "Resampled from 8000 to 16000 samples per second." in done.stdout
    assert "The decoder wrote: 3 " in done.stdout
    found = numbers(tmp_path)["sections"]
    kinds = ("encoder self-attention", "decoder self-attention", "decoder cross-attention")
    assert {f"Maps: {kind}" for kind in kinds} < set(found)
    maps = found["Maps: decoder cross-attention"]["maps"]
    assert np.shape(maps)[:2] == (1, 2)
    assert np.shape(maps)[3] == 25, "half of the second that the encoder sees"
    assert found["Sinks: encoder self-attention"]["tokens"][25] == "0.50 s"
    effect = np.array(found["Saliency"]["effect"])
    assert effect.shape[1] == 50
    assert np.abs(effect).max() > 0


def test_the_same_twice(models: dict[str, Path], tmp_path: Path) -> None:
    pages = []
    for _ in range(2):
        done = run(tmp_path, models["text"], "a cat", *FILES, "--what", "saliency", "--seed", "3")
        assert done.exit_code == 0, done.output
        pages.append((tmp_path / "out.html").read_bytes() + (tmp_path / "out.json").read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("model", "given", "options", "words"),
    [
        ("nowhere", "a", (), "is not a folder"),
        ("empty", "a", (), "has no config.json: no model of transformers"),
        ("weightless", "a", (), "has no weights"),
        ("broken", "a", (), "cannot load config.json"),
        ("cut", "a", (), "cannot load the model"),
        ("mute", "a", (), "cannot load an image processor"),
        ("text", " ", (), "INPUT is an empty text"),
        ("text", "none.txt", (), "INPUT none.txt: no such file"),
        ("text", "junk.txt", (), "cannot be read as text"),
        ("image", "none.png", (), "INPUT none.png: no such file"),
        ("image", "junk.png", (), "INPUT junk.png cannot be read as an image"),
        ("audio", "junk.wav", (), "INPUT junk.wav cannot be read as a WAV recording"),
        ("audio", "silent.wav", (), "it holds no samples"),
        ("text", "a cat", ("--layers", "2"), "has no layer 2; its layers are 0 to 1"),
        ("text", "a cat", ("--heads", "0,7"), "has no head 7; its heads are 0 to 1"),
        ("text", "a cat", ("--layers", "x"), "--layers must be whole numbers"),
        ("text", "a cat", ("--what", "map"), "--what must be of sinks, heads, maps, saliency"),
        ("text", "a cat", ("--runs", "7"), "--runs must be an even number"),
        ("text", "a cat", ("--device", "tpu"), "torch sees no such device"),
        ("text", "a cat", ("--out", "no/x.html"), "no such folder: no"),
        ("text", "pictures", (), "pictures is a folder; those of pictures are read, for image"),
        ("image", "pictures", (), "pictures is a folder without pictures"),
        ("image", "cats", (), "the subfolder 'cats' names no class of the model (LABEL_0, LABEL_1"),
        ("image", "broken_folder", (), "b.png cannot be read as an image"),
        ("image", "good", ("--pictures", "0"), "--pictures must be at least 1, got 0"),
        ("image", "good", ("--what", "maps,heads"), "--what maps looks at one picture"),
        ("image", "noise.png", ("--pictures", "3"), "--pictures is for an INPUT that is a folder"),
        ("text", "a cat", ("--pictures", "3"), "--pictures is for an INPUT that is a folder"),
        ("windows", "noise.png", (), "layers of one size without windows"),
        ("convolutions", "noise.png", (), "has no layer of attention that is known here"),
    ],
)
def test_wrong_usage(
    models: dict[str, Path],
    tmp_path: Path,
    model: str,
    given: str,
    options: tuple[str, ...],
    words: str,
) -> None:
    folder = models.get(model, tmp_path / model)
    if model not in models and model != "nowhere":
        folder.mkdir()
    if model == "windows":
        tiny.vision_classifier(folder, transformers, "Swin")
        tiny.picture(tmp_path / given)
    elif model == "convolutions":
        tiny.convolutional_classifier(folder, transformers)
        tiny.picture(tmp_path / given)
    elif model in ("weightless", "broken", "cut"):
        good = (models["text"] / "config.json").read_text()
        (folder / "config.json").write_text(good if model != "broken" else "{")
        if model != "weightless":
            (folder / "model.safetensors").write_bytes(b"\x10" * 100)
    elif model == "mute":
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((models["image"] / name).read_bytes())
    if given.startswith("junk"):
        (tmp_path / given).write_bytes(b"\xff\xfe\x00\x9d" * 9)
    if given in ("pictures", "cats", "broken_folder", "good"):
        inside = tmp_path / given / ("cats" if given == "cats" else "")
        inside.mkdir(parents=True)
        if given != "pictures":
            tiny.picture(inside / "a.png")
        if given == "broken_folder":
            (inside / "b.png").write_bytes(b"\xff" * 9)
    if given == "silent.wav":
        tiny.recording(tmp_path / given, rate=1)
    done = run(tmp_path, folder, given, "--json", "out.json", *options)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert len(said) == 1
    assert said[0].startswith("regard inspect: ")
    assert not list(tmp_path.glob("*.html"))
    assert not (tmp_path / "out.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_weights_that_are_missing_are_told(models: dict[str, Path], tmp_path: Path) -> None:
    for path in models["text"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForTokenClassification"]
    config["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run(tmp_path, tmp_path, "a cat", "--what", "sinks")
    assert done.exit_code == 0, done.output
    assert "weights are not in the files and are random here" in done.stdout


def test_recordings(tmp_path: Path) -> None:
    path = tiny.recording(tmp_path / "tone.wav")
    samples, rate = read_wave(path)
    assert rate == 8000
    assert samples.shape == (4000,)
    assert 0.55 < np.abs(samples).max() < 0.62
    time = np.arange(16000 // 2) / 16000
    wanted = 20000 / 32768 * np.sin(2 * np.pi * (200 + 400 * time) * time)
    twice = resample(samples, 8000, 16000)
    # The ends of a recording that does not repeat itself ring.
    np.testing.assert_allclose(twice[200:-200], wanted[200:-200], atol=0.02)


@pytest.mark.slow
@pytest.mark.requires("resource:minilm")
def test_a_real_text_model(tmp_path: Path) -> None:
    """What is known of MiniLM: attention collects on [CLS] and [SEP]; content words matter."""
    model, tokenizer = resources.minilm()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sentence = "The cat that the dog chased sat on the mat."
    done = run(tmp_path, tmp_path / "model", sentence, "--json", "out.json")
    assert done.exit_code == 0, done.output
    found = numbers(tmp_path)["sections"]
    received = np.array(found["Sinks: self-attention"]["received"]).mean((0, 1))
    assert received.argmax() == 0
    assert received[0] > 0.3
    words = found["Saliency"]["parts"]
    effect = np.array(found["Saliency"]["effect"])[0]
    best = {words[i] for i in np.argsort(-effect)[:4]}
    assert {"cat", "mat"} <= best
    assert not {"the", "."} & best


@pytest.mark.slow
@pytest.mark.requires("resource:vit_small")
@pytest.mark.requires("resource:images")
def test_a_real_vision_model(tmp_path: Path) -> None:
    """Heads of the first layers look near, on average, and those of later ones farther."""
    vision = resources.vit_small()
    vision.model.save_pretrained(tmp_path / "model")
    tiny.processor(transformers, 224).save_pretrained(tmp_path / "model")
    Image.fromarray(resources.images("astronaut")["astronaut"]).save(tmp_path / "picture.png")
    what = ("--what", "heads,sinks", "--json", "out.json")
    done = run(tmp_path, tmp_path / "model", "picture.png", *what)
    assert done.exit_code == 0, done.output
    heads = numbers(tmp_path)["sections"]["Heads: self-attention"]
    assert np.shape(heads["patterns"]) == (12, 6)
    distance = np.array(heads["distance, patches"]).mean(1)
    assert distance[1:4].mean() < distance[7:].mean()


@pytest.mark.slow
@pytest.mark.requires("resource:whisper_tiny")
@pytest.mark.requires("resource:librivox")
def test_a_real_speech_model(tmp_path: Path) -> None:
    """The transcript is right, and cross-attention moves through the recording with it."""
    model, _, tokenizer = resources.whisper_tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(tmp_path / "model")
    spoken = resources.librivox()[0]
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setparams((1, 2, spoken.rate, 0, "NONE", ""))
        file.writeframes((spoken.samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    what = ("--what", "maps", "--json", "out.json")
    done = run(tmp_path, tmp_path / "model", "speech.wav", *what)
    assert done.exit_code == 0, done.output
    told = next(line for line in done.stdout.splitlines() if line.startswith("The decoder wrote"))
    heard = told.replace(" ", "").replace("␣", " ").lower()
    for word in ("leisure", "consider", "power"):
        assert word in heard
    maps = np.array(numbers(tmp_path)["sections"]["Maps: decoder cross-attention"]["maps"])
    centres = maps[2, 5] @ np.arange(maps.shape[-1]) / maps[2, 5].sum(-1)  # an alignment head
    assert np.corrcoef(centres[2:], np.arange(len(centres) - 2))[0, 1] > 0.9
