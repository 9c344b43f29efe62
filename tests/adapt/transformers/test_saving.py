"""Swapped models in state dicts and folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models as tiny
from adapt.transformers.models_and_inputs import IDS, case, output
from regard.adapt import transformers as adapt

SWAPS = {
    "local_linear": {"ridge": 3.0, "learn": ("ridge", "bandwidth")},
    "softmax": {"learn": "temperature"},
    "hedgehog": {"features": "exp_dim", "feature_dim": 4},
    "hedgehog_window": {"window_length": 3, "gamma": 0.3},
    "gated_delta": {"past": 2},
}


def disturbed(model: torch.nn.Module) -> None:
    made = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=made))


@pytest.mark.parametrize("mechanism", SWAPS)
def test_folders_bring_everything_back(tmp_path: Path, mechanism: str) -> None:
    model = tiny.decoder("Llama")
    done = adapt.swap(model, mechanism, **SWAPS[mechanism])
    assert done.parameters()
    disturbed(model)
    adapt.save_pretrained(model, tmp_path)
    again = adapt.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(output(again, {"input_ids": IDS}), output(model, {"input_ids": IDS}))
    assert adapt.report(again).swapped == (mechanism,) * 3
    adapt.restore(model)
    plain = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(output(plain, {"input_ids": IDS}), output(model, {"input_ids": IDS}))


def test_state_dicts_go_round() -> None:
    one, other = tiny.decoder("Llama"), tiny.decoder("Llama")
    for model in (one, other):
        adapt.swap(model, "gated_delta")
    disturbed(one)
    other.load_state_dict(one.state_dict())
    assert torch.equal(output(one, {"input_ids": IDS}), output(other, {"input_ids": IDS}))


def test_tied_weights_and_half_precision(tmp_path: Path) -> None:
    model = tiny.decoder("Llama", tie_word_embeddings=True).to(torch.bfloat16)
    done = adapt.swap(model, "local_linear", ridge=1e4, learn=("ridge", "bandwidth"))
    assert {p.dtype for p in done.parameters().values()} == {torch.float32}
    adapt.save_pretrained(model, tmp_path)
    again = adapt.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert output(again, {"input_ids": IDS}).isfinite().all()


def test_what_each_head_chose() -> None:
    model = tiny.decoder("Llama")
    done = adapt.swap(model, "local_linear", ridge=3.0, learn=("ridge", "bandwidth"))
    chosen = done.chosen()["model.layers.1.self_attn"]
    torch.testing.assert_close(chosen["ridge"], [3.0] * 4)
    assert chosen["scale"] == [1.0] * 4


def test_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no regard_swap.json"):
        adapt.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one with swapped layers"):
        adapt.save_pretrained(tiny.decoder("Llama"), tmp_path)
    model = tiny.decoder("Llama")
    adapt.swap(model, "gated_delta")
    adapt.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=r"does not fit|layers must be"):
        adapt.from_pretrained(tmp_path, case("bert", "none")[0])
    (tmp_path / "regard_swap.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        adapt.from_pretrained(tmp_path)
    (tmp_path / "regard_swap.json").write_text("{}")
    with pytest.raises(ValueError, match="regard.swap/1"):
        adapt.from_pretrained(tmp_path)
