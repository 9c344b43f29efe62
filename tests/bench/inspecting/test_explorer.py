"""Linked views of heads: what the page shows, in a browser, is what the arrays say."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lens.tiny_vit import golden_numbers
from regard.bench.inspecting.explorer import CLASSES, as_data, explorer
from regard.bench.inspecting.gathering import Answers, Explored, Shown
from regard.bench.report.page import page
from regard.lens.compact import as_bytes, from_bytes
from regard.lens.importance import METRICS
from regard.lens.patterns import PatternSample
from regard.lens.strength import strength_profile
from regard.lens.templates import template_scores

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="


@pytest.fixture(scope="module")
def out() -> dict[str, Any]:
    return golden_numbers()["out"]


def softmax(logits: Any) -> np.ndarray:
    return torch.softmax(torch.as_tensor(logits).double(), -1).numpy()


def found(out: dict[str, Any], *, classes: bool = True, clusters: bool = False) -> Explored:
    """The golden numbers of two pictures; weights are those of the first and of it reversed."""
    labels = golden_numbers()["in"]["labels"]
    weights = [out["attention_image0"], out["attention_image0"].flip(1)]
    pictures = [
        Shown(f"picture {n}", PIXEL, int(labels[n]), *as_bytes(part))
        for n, part in enumerate(weights)
    ]
    made = Explored(
        [0, 1, 2],
        [0, 1, 2],
        (4, 4),
        1,
        1,
        pictures,
        strength_profile(torch.stack(weights), 4),
        template_scores(weights[0], 4).best(),
        classes={n: f"class {n} </script>" for n in range(6)},
    )
    if classes:
        without = out["pruned_logits"][:, :, :2].permute(2, 0, 1, 3).double().numpy()
        whole = out["logits"][:2].double().numpy()
        order = list(np.ndindex(3, 3))
        made.answers = Answers(
            whole,
            without,
            without.mean(2),
            np.stack([whole, without[:, 0, 0], without.mean((1, 2))], 1),
            order,
            [0, 1, 9],
            {name: out[f"importance.{name}"].double().numpy() for name in METRICS},
            True,
        )
    if clusters:
        pytest.importorskip("sklearn")
        sample = PatternSample(4, 1, size=16)
        for n, part in enumerate(weights):
            for layer in range(3):
                sample.add(n, layer, part[layer])
        made.patterns = sample.summary(clusters=2, epochs=2, width=4, embed="pca")
        made.places, made.small = sample.places, sample.small
    return made


def test_the_data_stand_in_the_page(out: dict[str, Any]) -> None:
    text = explorer(found(out))
    data = json.loads(re.search(r'id="explored">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    profile = found(out).profile.strength_mass_k
    np.testing.assert_allclose(data["profile"], profile, rtol=1e-3)
    told = data["answers"]
    np.testing.assert_array_equal(sorted(told["numbers"]), range(6))
    assert told["classes"] == [f"class {n} </script>" for n in told["numbers"]]
    assert told["rest"] == 0
    # The last column stands for other classes, of which there are none here.
    whole = np.frombuffer(base64.b64decode(told["whole"]), "<f4").reshape(2, 6)
    np.testing.assert_array_equal(whole, out["logits"][:2, told["numbers"]])
    codes = np.frombuffer(base64.b64decode(data["pictures"][0]["codes"]), "u1")
    most = np.frombuffer(base64.b64decode(data["pictures"][0]["most"]), "<f4")
    weights = from_bytes(codes.reshape(3, 3, 17, 17), most.reshape(3, 3, 17))
    np.testing.assert_allclose(weights, out["attention_image0"], atol=1 / 255)
    assert "http" not in text.replace("http://www.w3.org", ""), "it opens offline"
    without = json.loads(
        re.search(r'id="explored">(.*?)</', explorer(found(out, classes=False)))[1]  # type: ignore[index]
    )
    assert without["answers"] is None
    assert without["patterns"] is None


def test_classes_that_are_never_the_answer_are_one(out: dict[str, Any]) -> None:
    """Of many classes those that win somewhere are kept; probabilities stay what they are."""
    made = found(out)
    random = np.random.default_rng(0)
    count = 200
    shapes = {"whole": (2,), "without": (2, 3, 3), "without_layer": (2, 3), "in_order": (2, 3)}
    logits = {name: random.normal(size=(*shape, count)) for name, shape in shapes.items()}
    logits = {name: part - 20 * (np.arange(count) > 30) for name, part in logits.items()}
    logits["without"][0, 1, 1, 150] = 50
    assert made.answers is not None
    made.answers = Answers(
        **logits, order=made.answers.order, counts=[0, 1, 9], metrics=made.answers.metrics,
        labelled=False,
    )  # fmt: skip
    told = as_data(made)["answers"]
    assert len(told["numbers"]) == CLASSES
    assert told["rest"] == count - CLASSES
    assert 150 in told["numbers"]
    assert told["lost"] == 0
    kept = np.frombuffer(base64.b64decode(told["without"]), "<f4").reshape(2, 3, 3, CLASSES + 1)
    wanted = softmax(logits["without"])[..., told["numbers"]]
    np.testing.assert_allclose(softmax(kept.copy())[..., :-1], wanted, rtol=1e-5)


def seen(path: Path, choice: str) -> str:
    """The page's elements after its script ran, with a choice in the address."""
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            "--virtual-time-budget=2000", f"--user-data-dir={path.parent / 'browser'}",
            f"{path.as_uri()}#{choice}",
        ],
        capture_output=True,
        timeout=100,
        check=True,
    )  # fmt: skip
    text = done.stdout.decode()
    script = text.index('<script type="application/json"')
    return text[text.index('id="explorer"') : script] + text[text.index("</script>\n</div>") :]


def column(dom: str, kind: str) -> list[float]:
    return [float(value) for value in re.findall(rf'class="{kind}">([\d.]+)<', dom)]


def pressed(dom: str) -> list[str]:
    return re.findall(r'<button [^>]*title="(layer[^"]+)"[^>]*aria-pressed="true"', dom)


def numbers(dom: str, name: str) -> list[float]:
    """What a view says to those who cannot see it."""
    own = next(tag for tag in re.findall(r"<[^>]+>", dom) if f'id="{name}"' in tag)
    told = re.search(r'aria-label="([^"]+)"', own)
    assert told is not None
    return [float(word) for word in told[1].split() if word[0].isdigit()]


@pytest.mark.slow
@pytest.mark.requires("program:chromium")
def test_a_choice_is_shown_everywhere(out: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "heads.html"
    made = found(out, clusters=True)
    path.write_text(page("Heads", [explorer(made)]), encoding="utf-8")
    whole, without = softmax(out["logits"][0]), softmax(out["pruned_logits"][:, :, 0])
    for layer, head, off in ((0, 0, ""), (1, 2, ""), (1, 2, "1.2"), (0, 1, "2.2")):
        dom = seen(path, f"layer={layer}&head={head}&query=5&off={off}&metric=entropy")
        assert pressed(dom) == [f"layer {layer}, head {head}"]
        # Strength by distance, and where the patch looks over the picture.
        profile = made.profile.strength_mass_k[layer, head]
        np.testing.assert_allclose(numbers(dom, "profile"), profile, rtol=1e-3)
        heat = out["attention_image0"][layer, head, 5, 1:]
        np.testing.assert_allclose(numbers(dom, "over"), heat, atol=6e-3)
        assert "from the patch (1, 0)" in dom
        now = without[tuple(int(n) for n in off.split("."))] if off else whole
        np.testing.assert_allclose(sorted(column(dom, "chance")), np.sort(now), atol=6e-5)
        np.testing.assert_allclose(sorted(column(dom, "before")), np.sort(whole), atol=6e-5)
    assert "Measured with layer 2, head 2 off." in dom
    # Two heads at once were not measured: a sum, which says that it is one.
    dom = seen(path, "off=0.1_2.2")
    pruned = out["pruned_logits"][:, :, 0].double()
    base = out["logits"][0].double()
    wanted = softmax(pruned[0, 1] + pruned[2, 2] - base)
    np.testing.assert_allclose(sorted(column(dom, "chance")), np.sort(wanted), atol=6e-5)
    assert "Estimated for 2 heads off" in dom
    # A layer, and the heads that matter least, were.
    dom = seen(path, "off=1.0_1.1_1.2")
    wanted = softmax(pruned[1].mean(0))
    np.testing.assert_allclose(sorted(column(dom, "chance")), np.sort(wanted), atol=6e-5)
    assert "Measured with 3 heads off" in dom
    dom = seen(path, "off=" + "_".join(f"{layer}.{head}" for layer, head in np.ndindex(3, 3)))
    wanted = softmax(pruned.mean((0, 1)))
    np.testing.assert_allclose(sorted(column(dom, "chance")), np.sort(wanted), atol=6e-5)
    assert "9 of 9" in dom
    # A choice that does not exist is the first one.
    dom = seen(path, "layer=9&head=x&metric=none&picture=7&query=99&off=5.5&filter=no")
    assert pressed(dom) == ["layer 0, head 0"]
    assert "picture 0, from the class token" in dom
    np.testing.assert_allclose(sorted(column(dom, "chance")), np.sort(whole), atol=6e-5)


@pytest.mark.slow
@pytest.mark.requires("program:chromium")
def test_views_follow_each_other(out: dict[str, Any], tmp_path: Path) -> None:
    """Clicks and keys in one view change the others, and the address."""
    made = found(out, clusters=True)
    assert made.patterns is not None
    path = tmp_path / "heads.html"

    def after(script: str, choice: str = "") -> str:
        told = f"<script>{script}\ndocument.body.append(location.hash);</script>"
        path.write_text(page("Heads", [explorer(made), told]), encoding="utf-8")
        return seen(path, choice)

    dom = after("""document.querySelector('[title="layer 2, head 1"]').click();
        document.getElementById("out").click();""")
    assert pressed(dom) == ["layer 2, head 1"]
    wanted = softmax(out["pruned_logits"][2, 1, 0])
    np.testing.assert_allclose(sorted(column(dom, "chance")), np.sort(wanted), atol=6e-5)
    assert "off=2.1" in dom
    # Keys in the matrix: down, then off, then selected.
    dom = after("""for (const key of ["ArrowDown", "o", "p"]) document.querySelector(
        '#matrix [aria-pressed="true"]').dispatchEvent(new KeyboardEvent("keydown", { key }));""")
    assert pressed(dom) == ["layer 1, head 0"]
    assert "off=1.0" in dom
    assert "picked=1.0" in dom
    assert "1 heads selected" in dom
    # A cluster of patterns selects the heads that belong to it, in the matrix and the points.
    dom = after('document.querySelector("#gallery button").click();')
    own = made.patterns.distribution[..., 0] >= 0.5
    marked = [tag for tag in re.findall(r"<button [^>]*>", dom) if 'class="picked' in tag]
    assert len(marked) == own.sum()
    assert dom.count("<title>") >= 9 + 9 + 18, "heads twice, and a point per head and picture"
    # The second picture, whose heads are in reverse order.
    dom = after(
        'document.querySelectorAll("#pictures button")[1].click();', "layer=0&head=0&query=3"
    )
    heat = out["attention_image0"][0, 2, 3, 1:]
    np.testing.assert_allclose(numbers(dom, "over"), heat, atol=6e-3)
    # A row of the matrix of weights, and the arrow to the next patch.
    dom = after(
        """document.getElementById("over").dispatchEvent(
        new KeyboardEvent("keydown", { key: "ArrowRight" }));
        document.getElementById("closer").click();""",
        "query=3",
    )
    assert "query=4" in dom
    assert "zoom=1.5" in dom
    dom = after('document.getElementById("pin").click();', "layer=1&head=1")
    assert "Pinned: layer 1, head 1, picture 0" in dom
    # Only pictures whose answer is as chosen are listed.
    right = out["logits"][:2].argmax(-1).numpy() == golden_numbers()["in"]["labels"][:2].numpy()
    dom = seen(path, "filter=right")
    assert f"{right.sum()} of 2" in dom


@pytest.mark.slow
@pytest.mark.requires("program:chromium")
def test_what_is_saved(out: dict[str, Any], tmp_path: Path) -> None:
    """The files that the buttons make, read back from the page."""
    path = tmp_path / "heads.html"
    made = found(out, clusters=True)
    catch = """<pre id="saved"></pre><script>
        const blobs = [];
        URL.createObjectURL = (blob) => { blobs.push(blob); return "#"; };
        HTMLAnchorElement.prototype.click = function () {};
    </script>"""
    press = """<script>
        const every = document.querySelectorAll("#csv, #json, [data-export]");
        for (const button of every) button.click();
        setTimeout(async () => {
          const texts = [];
          for (const blob of blobs) {
            const text = blob.type === "image/png" ? "" : await blob.text();
            texts.push([blob.type, blob.size, text]);
          }
          const told = unescape(encodeURIComponent(JSON.stringify(texts)));
          document.getElementById("saved").textContent = btoa(told);
        }, 200);
    </script>"""
    path.write_text(page("Heads", [catch, explorer(made), press]), encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--virtual-time-budget=4000", f"--user-data-dir={tmp_path / 'browser'}",
         f"{path.as_uri()}#layer=1&head=2&off=1.2&picked=0.1"],
        capture_output=True, timeout=100, check=True,
    )  # fmt: skip
    coded = re.search(r'id="saved">([^<]+)<', done.stdout.decode())
    assert coded is not None
    saved = json.loads(base64.b64decode(coded[1]))
    kinds = [kind for kind, _, _ in saved]
    assert kinds.count("image/svg+xml") == 5
    assert kinds.count("image/png") == 3
    assert all(size > 100 for _, size, _ in saved)
    lines = next(text for kind, _, text in saved if kind == "text/csv").strip().split("\r\n")
    assert len(lines) == 1 + 9
    row = dict(zip(lines[0].split(","), lines[1 + 5].split(","), strict=True))
    assert (row['"layer"'], row['"head"'], row['"off"'], row['"selected"']) == ("1", "2", "1", "0")
    wanted = float(out["importance.jsd"][1, 2])
    assert float(row['"jsd"']) == pytest.approx(wanted, rel=1e-3)
    told = json.loads(next(text for kind, _, text in saved if kind == "application/json"))
    assert told["chosen"] == {"layer": 1, "head": 2}
    assert told["selected"] == [{"layer": 0, "head": 1}]
    now = told["answers"][1]["now"]
    for number, chance in enumerate(softmax(out["pruned_logits"][1, 2, 1])):
        assert now[f"class {number} </script>"] == pytest.approx(chance, abs=1e-6)
    np.testing.assert_allclose(told["weights"], out["attention_image0"][1, 2, 0], atol=4e-3)
