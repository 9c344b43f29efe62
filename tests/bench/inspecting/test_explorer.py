"""Linked views of heads: what the page shows, in a browser, is what the arrays say."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from lens.tiny_vit import golden_numbers
from regard.bench.inspecting.explorer import explorer
from regard.bench.report.page import page


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    out = golden_numbers()["out"]
    weights = out["attention_image0"]
    return {
        "loss_increase": out["importance.loss_increase"].numpy(),
        "entropy": out["profile.entropy_nats"].numpy(),
        "profile": out["profile.strength_mass_k"].numpy(),
        "heat": weights[:, :, 0, 1:].unflatten(-1, (4, 4)).numpy(),
        "whole": torch.softmax(out["logits"][0].double(), -1).numpy(),
        "without": torch.softmax(out["pruned_logits"][:, :, 0].double(), -1).numpy(),
    }


def made(arrays: dict[str, np.ndarray], *, classes: bool = True) -> str:
    more = {"whole": arrays["whole"], "without": arrays["without"]} if classes else {}
    return explorer(
        picture="data:image/gif;base64,R0lGODlhAQABAAAAACw=",
        layers=range(3),
        heads=range(3),
        metrics={name: arrays[name] for name in ("loss_increase", "entropy")},
        profile=arrays["profile"],
        heat=arrays["heat"],
        query="from the class token",
        classes=[f"class {n} </script>" for n in range(6)] if classes else (),
        **more,
    )


def seen(path: Path, choice: str) -> str:
    """The page's elements after its script ran, with a choice in the address."""
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            f"--user-data-dir={path.parent / 'browser'}", f"{path.as_uri()}#{choice}",
        ],
        capture_output=True,
        timeout=100,
        check=True,
    )  # fmt: skip
    text = done.stdout.decode()
    return text[text.index('id="matrix"') :]


def chances(dom: str) -> list[float]:
    return [float(found) for found in re.findall(r'class="chance">([\d.]+)<', dom)]


def test_the_data_stand_in_the_page(arrays: dict[str, np.ndarray]) -> None:
    text = made(arrays)
    data = json.loads(re.search(r'id="explored">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    order = np.argsort(-arrays["whole"])
    np.testing.assert_allclose(data["whole"], arrays["whole"][order], rtol=1e-5)
    np.testing.assert_allclose(data["without"], arrays["without"][..., order], rtol=1e-5)
    np.testing.assert_allclose(data["profile"], arrays["profile"], rtol=1e-3)
    assert data["classes"][0] == f"class {order[0]} </script>"
    assert "$$" not in text
    without = json.loads(re.search(r'id="explored">(.*?)</', made(arrays, classes=False))[1])  # type: ignore[index]
    assert without["without"] is None


@pytest.mark.slow
@pytest.mark.requires("program:chromium")
def test_a_choice_is_shown_everywhere(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "heads.html"
    path.write_text(page("Heads", [made(arrays)]), encoding="utf-8")
    order = np.argsort(-arrays["whole"])
    doms = {}
    for layer, head, out in ((0, 0, 0), (1, 2, 0), (1, 2, 1)):
        choice = f"layer={layer}&head={head}&metric=entropy&out={out}"
        dom = doms[layer, head, out] = seen(path, choice)
        pressed = re.findall(r'<button title="([^"]+)"[^>]*aria-pressed="true"', dom)
        assert pressed == [f"layer {layer}, head {head}"]
        line = re.search(r'id="profile"[^>]*aria-label="([^"]+)"', dom)
        assert line is not None
        shown = [float(number) for number in line[1].split()]
        np.testing.assert_allclose(shown, arrays["profile"][layer, head], rtol=1e-3)
        wanted = arrays["without"][layer, head] if out else arrays["whole"]
        np.testing.assert_allclose(chances(dom), wanted[order], atol=5e-5)
    heats = [re.findall(r"rgba\(208, 60, 20, ([\d.]+)\)", dom) for dom in doms.values()]
    assert len(heats[0]) == 16
    assert heats[0] != heats[1] == heats[2]
    heat = arrays["heat"][1, 2].ravel()
    # A browser keeps opacity in 255 steps.
    np.testing.assert_allclose(list(map(float, heats[1])), 0.85 * heat / heat.max(), atol=1 / 255)
    clicks = """<script>
        document.querySelector('[title="layer 2, head 1"]').click();
        document.getElementById("out").click();
    </script>"""
    path.write_text(page("Heads", [made(arrays), clicks]), encoding="utf-8")
    dom = seen(path, "layer=1&head=2")
    assert re.findall(r'title="([^"]+)"[^>]*aria-pressed="true"', dom) == ["layer 2, head 1"]
    np.testing.assert_allclose(chances(dom), arrays["without"][2, 1][order], atol=5e-5)
    path.write_text(page("Heads", [made(arrays)]), encoding="utf-8")
    # A choice that does not exist is the first one.
    dom = seen(path, "layer=9&head=x&metric=none")
    assert re.findall(r'title="([^"]+)"[^>]*aria-pressed="true"', dom) == ["layer 0, head 0"]
