"""Saliency by occlusion, against the authors' code and against what must come out."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from golden_files import parts
from regard.lens.agreement import correlate, normalise_saliency
from regard.lens.occlusion import (
    OcclusionSum,
    occlusion_saliency,
    occlusion_scores,
    token_saliency,
)
from regard.lens.occlusion_masks import random_masks, slic_masks


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Tensor]]:
    return parts("cross_attention_explanation/spes_kl")


def test_scores_and_maps_of_the_official_code(golden: dict[str, dict[str, Tensor]]) -> None:
    given, wanted = golden["in"], golden["out"]
    clean, perturbed = given["orig_probs"].log(), given["perturbed_probs"].log()
    found = occlusion_saliency(lambda _: perturbed, given["input_masks"], clean=clean)
    torch.testing.assert_close(
        torch.from_numpy(found.values), wanted["input_saliency"], atol=1e-5, rtol=0
    )
    scores = occlusion_scores(clean, perturbed)
    tokens = token_saliency(scores, given["token_masks"])
    torch.testing.assert_close(tokens, wanted["token_saliency"], atol=1e-5, rtol=0)
    for to, name in (("mean_std", "mean_std"), ("paired_min_max", "norm")):
        pair = normalise_saliency(torch.from_numpy(found.values), tokens, to=to)
        torch.testing.assert_close(pair[0], wanted[f"input_{name}"], atol=1e-4, rtol=0)
        torch.testing.assert_close(pair[1], wanted[f"token_{name}"], atol=1e-4, rtol=0)


def test_scorers_by_hand() -> None:
    clean = torch.tensor([[0.5, 0.5, 0.0]]).log()
    perturbed = torch.tensor([[[0.25, 0.5, 0.25]]]).log()
    # A probability that is 0 adds nothing, and gives no NaN.
    wanted = torch.tensor([[0.5]]) * torch.tensor(2.0).log()
    torch.testing.assert_close(occlusion_scores(clean, perturbed), wanted)
    said = torch.tensor([0])
    found = occlusion_scores(clean, perturbed, scorer="predicted_token", tokens=said)
    torch.testing.assert_close(found, torch.tensor([[0.25]]))
    with pytest.raises(ValueError, match="tokens must be"):
        occlusion_scores(clean, perturbed, scorer="predicted_token")
    with pytest.raises(ValueError, match="scorer"):
        occlusion_scores(clean, perturbed, scorer="KL")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="perturbed must be"):
        occlusion_scores(clean, perturbed[..., :2])


FRAMES = 24
SEEN = ((3, 4, 5), (10, 11), (20, 21, 22, 23))


def _linear(masks: Tensor) -> Tensor:
    """Log-odds of token i are the sum over its frames."""
    odds = torch.stack([masks[:, list(frames)].sum(1) for frames in SEEN], dim=1)
    return torch.log_softmax(torch.stack([odds, -odds], dim=-1), dim=-1)


def test_peaks_where_the_output_depends() -> None:
    masks = random_masks(2000, (FRAMES,), generator=torch.Generator().manual_seed(0))
    values = torch.from_numpy(occlusion_saliency(_linear, masks).values)
    for row, frames in zip(values, SEEN, strict=True):
        assert set(row.topk(len(frames)).indices.tolist()) == set(frames)


def test_error_falls_as_the_root_of_the_runs() -> None:
    def estimate(runs: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        masks = random_masks(runs, (FRAMES,), antithetic=True, generator=generator)
        return torch.from_numpy(occlusion_saliency(_linear, masks, batch_size=4096).values)

    exact = estimate(200_000, 999)
    errors = [
        torch.stack([(estimate(runs, seed) - exact).norm() for seed in range(24)]).mean()
        for runs in (250, 500, 1000)
    ]
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert 1.3 <= float(fewer / more) <= 1.5


def test_antithetic_halves_are_independent_and_complementary() -> None:
    masks = random_masks(8, (2, 3), antithetic=True)
    assert torch.equal(masks[0::2], 1 - masks[1::2])
    total = OcclusionSum(1, (2, 3))
    total.add(torch.ones(8, 1), masks)
    assert torch.equal(total.denominator[0], torch.full((6,), 2.0, dtype=torch.float64))
    halves = total.result().halves
    assert halves.shape == (2, 1, 2, 3)
    with pytest.raises(ValueError, match="probability must be 0.5"):
        random_masks(8, (2, 3), antithetic=True, probability=0.2)


def by_product(scores: Tensor, masks: Tensor) -> Tensor:
    total = OcclusionSum(scores.shape[1], tuple(masks.shape[1:]))
    total.add(scores, masks)
    return torch.from_numpy(total.result().values).double()


def by_loop(scores: Tensor, masks: Tensor) -> Tensor:
    numerator = torch.zeros(scores.shape[1], *masks.shape[1:], dtype=torch.float64)
    denominator = torch.zeros(masks.shape[1:], dtype=torch.float64)
    for mask, score in zip(masks, scores.double(), strict=True):
        hidden = 1 - mask.double()
        numerator += score[:, None, None] * hidden
        denominator += hidden
    return numerator / denominator


def test_one_product_equals_the_loop() -> None:
    masks, scores = random_masks(256, (80, 400)), torch.rand(256, 26)
    torch.testing.assert_close(by_product(scores, masks), by_loop(scores, masks), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_one_product_is_faster_than_the_loop() -> None:
    """For the input of Whisper, 30 s of sound; over 4 s it is 4 times as fast, not 5."""
    masks, scores = random_masks(256, (80, 3000)), torch.rand(256, 26)
    seconds = {}
    for function in (by_product, by_loop):
        times = []
        for _ in range(2):
            begun = time.process_time()
            function(scores, masks)
            times.append(time.process_time() - begun)
        seconds[function] = min(times)
    assert seconds[by_loop] > 5 * seconds[by_product]


def test_batches_change_nothing() -> None:
    masks = random_masks(37, (FRAMES,))
    one = occlusion_saliency(_linear, masks, batch_size=64)
    for batch_size in (1, 7, 16):
        other = occlusion_saliency(_linear, masks, batch_size=batch_size)
        torch.testing.assert_close(torch.from_numpy(other.values), torch.from_numpy(one.values))
        torch.testing.assert_close(torch.from_numpy(other.halves), torch.from_numpy(one.halves))


def test_never_hidden_is_zero() -> None:
    masks = torch.ones(4, FRAMES)
    masks[:, 3] = 0
    values = occlusion_saliency(_linear, masks).values
    assert (values[:, :3] == 0).all()
    assert values[0, 3] > 0


@pytest.mark.parametrize("kind", ["continuous", "frames", "bands"])
def test_kinds_of_masks(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    masks = random_masks(400, (6, 9), kind=kind, probability=0.25, generator=generator)
    assert masks.shape == (400, 6, 9)
    assert float(masks.mean()) == pytest.approx(0.75, abs=0.05)
    if kind == "frames":
        assert torch.equal(masks, masks[:, :1].expand_as(masks))
    if kind == "bands":
        assert torch.equal(masks, masks[:, :, :1].expand_as(masks))


def test_bad_masks() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        random_masks(2, (3,), probability=1.5)
    with pytest.raises(ValueError, match="kind"):
        random_masks(2, (3, 3), kind="slic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for kind='frames'"):
        random_masks(2, (3,), kind="frames")
    with pytest.raises(ValueError, match="spectrogram must be"):
        slic_masks(torch.zeros(3), 5)


@pytest.mark.requires("skimage")
def test_superpixels_are_hidden_as_a_whole() -> None:
    spectrogram = torch.zeros(20, 60)
    spectrogram[5:12, 20:40] = 1.0
    masks = slic_masks(spectrogram, 12, levels=(40, 80, 160), antithetic=True)
    assert masks.shape == (12, 20, 60)
    assert torch.equal(masks[0::2], 1 - masks[1::2])
    changes = (masks[:, :, 1:] != masks[:, :, :-1]).float().mean()
    assert 0 < float(changes) < 0.25  # independent values would change at half of the places
    with pytest.raises(ValueError, match="runs must be"):
        slic_masks(spectrogram, 2, levels=(40, 80, 160))


def test_a_picture_and_json(tmp_path) -> None:
    found = occlusion_saliency(_linear, random_masks(8, (FRAMES,)))
    found.picture(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert '"runs": 8' in found.to_json()
    assert float(correlate(found.values, found.values)) == pytest.approx(1.0)
