"""Correlations of maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.lens.agreement import (
    agreement,
    correlate,
    mean_correlation,
    normalise_map,
    normalise_saliency,
    pool_saliency,
    ranks,
    reliability,
)


def test_laws_of_correlation() -> None:
    a, b = torch.randn(2, 5, 7)
    for kind in ("pearson", "spearman"):
        assert float(correlate(a, a, kind=kind)) == pytest.approx(1)
        assert float(correlate(a, -a, kind=kind)) == pytest.approx(-1)
        assert float(correlate(a, -b, kind=kind)) == pytest.approx(
            -float(correlate(a, b, kind=kind))
        )
        assert float(correlate(a, torch.ones_like(a), kind=kind)) == 0
        per = correlate(a, b, kind=kind, per="token")
        assert per.shape == (5,)
        assert float(per[2]) == pytest.approx(float(correlate(a[2:3], b[2:3], kind=kind)))
        some = correlate(a, b, kind=kind, rows=[1, 3])
        assert float(some) == pytest.approx(float(correlate(a[[1, 3]], b[[1, 3]], kind=kind)))
    numpy = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
    assert float(correlate(a, b)) == pytest.approx(numpy, abs=1e-6)
    monotone = correlate(a, a.exp(), kind="spearman")
    assert float(monotone) == pytest.approx(1)


def test_ranks_of_equal_values() -> None:
    assert ranks(torch.tensor([2.0, 7.0, 2.0, 1.0])).tolist() == [2.5, 4.0, 2.5, 1.0]


def test_one_constant_row_counts_as_no_agreement() -> None:
    a = torch.tensor([[0.0, 1.0], [3.0, 3.0]])
    assert correlate(a, a, per="token").tolist() == [pytest.approx(1.0), 0.0]


@pytest.mark.parametrize("frames", [5, 6, 7, 10])
@pytest.mark.parametrize("mode", ["max2d", "mean", "max_time_mean_bands", "mean_time_max_bands"])
def test_pooling(frames: int, mode: str) -> None:
    values = torch.rand(2, 3, 10)
    found = pool_saliency(values, frames, mode=mode)
    assert found.shape == (2, frames)
    for j in range(frames):  # lengths that do not divide overlap
        cut = values[:, :, j * 10 // frames : -(-(j + 1) * 10 // frames)]
        wanted = {
            "max2d": cut.amax((1, 2)),
            "mean": cut.mean((1, 2)),
            "max_time_mean_bands": cut.amax(2).mean(1),
            "mean_time_max_bands": cut.mean(2).amax(1),
        }[mode]
        torch.testing.assert_close(found[:, j], wanted)
    other = pool_saliency(values.transpose(1, 2), frames, mode=mode, time_axis=1)
    assert torch.equal(found, other)


def test_normalised_maps() -> None:
    values = torch.randn(3, 4, 5)
    found = normalise_map(values).flatten(1)
    torch.testing.assert_close(found.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std(1), torch.ones(3))
    assert not normalise_map(torch.ones(2, 4)).any()
    tokens = torch.randn(3, 3, 1)
    inputs, previous = normalise_saliency(values, tokens, to="paired_min_max")
    assert previous is not None
    assert not previous[0, 1:].any()
    for i in range(3):
        both = torch.cat([inputs[i].flatten(), previous[i, : i + 1].flatten()])
        assert float(both.min()) == 0
        assert float(both.max()) == pytest.approx(1)


def test_agreement_knows_its_head(tmp_path) -> None:
    torch.manual_seed(0)
    attention = torch.rand(2, 3, 4, 30).softmax(-1)
    saliency = attention[1, 2] + 0.0
    noise = 0.3 * saliency.std() * torch.randn(2, 4, 30)
    found = agreement(attention, saliency, halves=saliency + noise, rows=[0, 1, 2])
    assert found.head[1, 2] == pytest.approx(1)
    assert np.unravel_index(found.head.argmax(), found.head.shape) == (1, 2)
    assert found.layer.argmax() == 1
    assert found.token.shape == (3,)
    assert 0.9 < found.reliability < 1
    assert found.corrected > found.all
    found.picture(tmp_path / "agreement.png")
    assert (tmp_path / "agreement.png").is_file()
    with pytest.raises(ValueError, match="saliency must be"):
        agreement(attention, saliency[:2])


def test_reliability_and_means() -> None:
    truth = torch.randn(20_000)
    first, second = truth + torch.randn(2, 20_000)
    # Halves with as much noise as truth correlate by 1/2; together they are worth 2/3.
    assert reliability(first, second) == pytest.approx(2 / 3, abs=0.02)
    assert reliability(first, -second) == 0
    assert mean_correlation([0.5, 0.5]) == pytest.approx(0.5)
    assert mean_correlation([0.0, 0.9]) > 0.45


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: correlate(torch.zeros(2, 3), torch.zeros(3, 2)), "b must be of the shape"),
        (lambda: correlate(torch.zeros(2), torch.zeros(2), kind="kendall"), "kind"),
        (lambda: correlate(torch.zeros(2, 2), torch.zeros(2, 2), rows=[2]), "rows must be"),
        (lambda: pool_saliency(torch.zeros(2, 3, 4), 5), "frames must be"),
        (lambda: pool_saliency(torch.zeros(3, 4), 2), "3 axes"),
        (lambda: normalise_saliency(torch.zeros(2, 3), torch.zeros(3, 3)), "tokens must be"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
