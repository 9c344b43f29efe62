"""Deletion curves and word error rates."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from regard.lens.deletion import deletion_auc, deletion_curve, word_error_rate


def test_deletion_prefers_the_true_map(tmp_path) -> None:
    truth = torch.zeros(4, 10)
    truth[1, 2:5] = 1

    def error(kept: Tensor) -> float:
        return 100 * float(1 - (kept * truth).sum() / truth.sum())

    good, bad = deletion_curve(truth, error), deletion_curve(-truth, error)
    assert good.area > 90 > 20 > bad.area
    assert good.scores[0] == 0
    assert good.scores[-1] == pytest.approx(100)
    assert deletion_auc(truth, error) == good.area
    good.picture(tmp_path / "deletion.png")
    assert (tmp_path / "deletion.png").stat().st_size > 1000
    assert json.loads(good.to_json())["percent"][-1] == 100
    with pytest.raises(ValueError, match="rising"):
        deletion_curve(truth, error, percent=(0, 50, 50))


def test_word_error_rate() -> None:
    assert word_error_rate("a b c d", "a x c") == 50
    assert word_error_rate("a", "b c d") == 100
    assert word_error_rate("a", "b c d", most=None) == 300
    assert word_error_rate(["a", "b"], []) == 100
    with pytest.raises(ValueError, match="at least one word"):
        word_error_rate("", "a")
