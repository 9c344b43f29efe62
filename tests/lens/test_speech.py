"""Times of words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from regard.lens.cross_attention import cross_attention_maps
from regard.lens.deletion import word_error_rate
from regard.lens.speech import alignment_matrix, token_frames, word_spans, word_times


def test_the_path_of_an_alignment() -> None:
    matrix = torch.full((3, 9), -1.0)
    for i, (first, last) in enumerate(((0, 1), (2, 5), (6, 8))):
        matrix[i, first : last + 1] = 1.0
    frames = token_frames(matrix)
    assert frames.tolist() == [[0, 1], [2, 5], [6, 8]]
    spans = word_spans([" he", "llo", " you"], frames, seconds_per_frame=0.02)
    assert [word for word, *_ in spans] == ["hello", "you"]
    assert spans[0][1:] == pytest.approx((0.0, 0.12))
    assert spans[1][1:] == pytest.approx((0.12, 0.18))
    with pytest.raises(ValueError, match="frames must be"):
        word_spans([" a"], frames, seconds_per_frame=0.02)


def test_alignment_matrix_forgets_what_every_token_looks_at() -> None:
    attention = torch.full((1, 2, 3, 12), 0.01)
    attention[..., 0] = 0.9  # a sink
    for i in range(3):
        attention[0, 0, i, 4 * i : 4 * i + 4] += 0.2
    found = alignment_matrix(attention, [(0, 0)], smooth=1)
    assert [int(row.argmax()) // 4 for row in found] == [0, 1, 2]
    assert alignment_matrix(attention, [(0, 0)], frames=9, smooth=3).shape == (3, 9)
    with pytest.raises(ValueError, match="pairs must be"):
        alignment_matrix(attention, [(1, 0)])
    with pytest.raises(ValueError, match="odd"):
        alignment_matrix(attention, [(0, 0)], smooth=4)


def test_times_of_words(tmp_path) -> None:
    attention = torch.full((2, 2, 4, 12), 0.01)
    for i in range(4):
        attention[1, 0, i, 3 * i : 3 * i + 3] += 0.3
    pieces = [" he", "llo", " you"]
    found = word_times(attention, pieces, [(1, 0)], seconds_per_frame=0.5, smooth=1)
    assert found.words == ("hello", "you")
    np.testing.assert_allclose(found.start, [0, 3])
    np.testing.assert_allclose(found.end, [3, 4.5])
    assert found.frames.tolist() == [[0, 2], [3, 5], [6, 8]]  # the end of the text has its own row
    assert found.matrix.shape == (3, 12)
    found.picture(tmp_path / "times.png")
    assert (tmp_path / "times.png").stat().st_size > 1000
    assert json.loads(found.to_json())["words"] == ["hello", "you"]
    with pytest.raises(ValueError, match="attention must be"):
        word_times(attention, [*pieces, " and", " more"], [(1, 0)], seconds_per_frame=0.5)
    with pytest.raises(ValueError, match="attention must be"):
        word_times(attention, pieces[:2], [(1, 0)], seconds_per_frame=0.5)
    with pytest.raises(ValueError, match="seconds_per_frame"):
        word_times(attention, pieces, [(1, 0)], seconds_per_frame=0)


@pytest.mark.slow
@pytest.mark.requires("resource:whisper_tiny", "resource:librivox")
def test_alignment_heads_follow_real_speech() -> None:
    from regard.testing import resources

    utterance = resources.librivox()[4]
    speech = resources.whisper_tiny()
    features = speech.features([utterance.samples])
    with torch.no_grad():
        said = [t for t in speech.model.generate(features)[0].tolist() if t < 50256]
    assert word_error_rate(utterance.text, speech.tokenizer.decode(said).strip(" .").lower()) == 0
    attention = cross_attention_maps(speech.model, features, torch.tensor([[50257, 50362, *said]]))
    assert attention.shape == (4, 6, 2 + len(said), 1500)
    found = word_times(
        attention[:, :, 1:],  # row 1 predicts the first piece
        [speech.tokenizer.decode([token]) for token in said],
        resources.WHISPER_ALIGNMENT_HEADS,
        seconds_per_frame=resources.WHISPER_SECONDS_PER_FRAME,
        frames=round(utterance.seconds * 50),
    )
    assert len(found.words) == len(utterance.words)
    errors = np.abs(found.start - [word.start for word in utterance.words])
    assert np.median(errors) < 0.1
