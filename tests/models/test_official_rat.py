"""The authors' models of RAT and of what it is compared with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import regard
from models.subjects import check_close
from regard.core.budgets import budget, relative_error
from regard.models import DecoderConfig, generate, published

GOLDEN = Path(__file__).parents[1] / "golden/rat"
MILLIONS = {"rat": 1298.8, "rat_attention": 1273.6, "rat_hybrid": 1286.2, "rat_rnn": 1273.6}
SMALL = {"dim": 16, "layers": 3, "vocabulary": 11}
SIZES = {
    "rat": {**SMALL, "heads": 4, "chunk_length": 3},
    "rat_attention": {**SMALL, "heads": 4, "window": 2},
    "rat_hybrid": {**SMALL, "heads": 4, "chunk_length": 3, "window": 2},
    "rat_rnn": {**SMALL, "longest": 9},
}


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, int]]:
    """The authors' tensors, what went in and came out, and the sizes."""
    data = load_file(GOLDEN / f"{name}.safetensors")
    given = json.loads((GOLDEN / f"{name}.json").read_text())["config"]
    names = {"vocab": "vocabulary", "D": "dim", "H": "heads", "L": "chunk_length", "nl": "layers"}
    names |= {"window": "window", "ffn": "mlp_dim"}
    sizes = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    theirs = {n.removeprefix("state."): t for n, t in data.items() if n.startswith("state.")}
    return theirs, data, sizes


@pytest.mark.parametrize(("name", "kind"), [("lm_rat", "rat"), ("lm_hybrid", "rat_hybrid")])
def test_is_the_model_of_the_authors(name, kind, tmp_path):
    theirs, data, sizes = golden(name)
    torch.save({"task": theirs, "lr_scheduler": {"step": 3}}, tmp_path / "checkpoint.pt")
    model = regard.create_model(kind, checkpoint=tmp_path / "checkpoint.pt", **sizes)
    logits = model(data["in.input_ids"])
    loss = cross_entropy(logits.flatten(0, 1), data["in.labels"].flatten())
    loss.backward()
    check_close(logits, data["out.logits"])
    check_close(loss, data["out.loss"])
    keys = published[kind].keys
    found = keys.to_theirs({name: p.grad for name, p in model.named_parameters()})
    wanted = {n.removeprefix("grad."): t for n, t in data.items() if n.startswith("grad.")}
    assert len(wanted) == 4
    for key, gradient in wanted.items():
        assert relative_error(found[key], gradient) < budget(torch.float32, "gradient"), key
    back = keys.to_theirs(model.state_dict())
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in back)


@pytest.mark.parametrize("name", MILLIONS)
def test_the_default_is_the_published_one(name):
    model = regard.create_model(name, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == MILLIONS[name]
    theirs = published[name].keys.to_theirs(model.state_dict())
    theirs = {key: list(tensor.shape) for key, tensor in theirs.items()}
    gated = {"rat": range(24), "rat_hybrid": range(0, 24, 2), "rat_rnn": range(24)}.get(name, ())
    layers = [f"backbone.layers.{i}" for i in range(24)]
    expected = {"embedding.wte.weight": [32000, 2048], "head.lm_head.weight": [32000, 2048]}
    expected["backbone.ln.weight"] = [2048]
    for i, layer in enumerate(layers):
        rows = 3 * 2048 + (2 * 2 * 128 if i in gated and name != "rat_rnn" else 0)
        expected |= {
            f"{layer}.seq_layer.in_proj.weight": [rows, 2048],
            f"{layer}.seq_layer.input_norm.weight": [2048],
            f"{layer}.seq_layer.out_proj.weight": [2048, 2048],
            f"{layer}.hidden_layer.fc1.weight": [8192, 2048],
            f"{layer}.hidden_layer.fc2.weight": [2048, 8192],
            f"{layer}.hidden_layer.ln.weight": [2048],
        }
        if i in gated:
            expected[f"{layer}.seq_layer.gate_bias"] = [2048]
    assert theirs == expected


@pytest.mark.parametrize("name", SIZES)
def test_there_and_back(name, tmp_path):
    torch.manual_seed(0)
    model = regard.create_model(name, **SIZES[name])
    theirs = published[name].keys.to_theirs(model.state_dict())
    compiled = {f"_orig_mod.{key}": tensor.clone() for key, tensor in theirs.items()}
    torch.save(compiled, tmp_path / "full.pt")
    told = ("dim", "layers", "vocabulary", *(("heads",) if name in ("rat", "rat_hybrid") else ()))
    untold = {size: value for size, value in SIZES[name].items() if size not in told}
    again = regard.create_model(name, checkpoint=tmp_path / "full.pt", **untold)
    assert again.config == regard.create_model(name, **{**SIZES[name], "mlp_dim": 64}).config
    tokens = torch.randint(11, (2, 8))
    assert torch.equal(again(tokens), model(tokens))
    assert DecoderConfig.of(json.loads(json.dumps(model.config.plain()))) == model.config
    del compiled["_orig_mod.backbone.layers.1.seq_layer.in_proj.weight"]
    torch.save(compiled, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"no backbone\.layers\.1\.seq_layer\.in_proj\.weight"):
        regard.create_model(name, checkpoint=tmp_path / "part.pt", **SIZES[name])


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    model = regard.create_model("rat", **SIZES["rat"])
    theirs = published["rat"].keys.to_theirs(model.state_dict())
    torch.save({key: tensor.clone() for key, tensor in theirs.items()}, tmp_path / "rat.pt")
    for name in ("rat_attention", "rat_rnn"):
        with pytest.raises(ValueError, match="checkpoint must be that of exactly this model"):
            regard.create_model(name, checkpoint=tmp_path / "rat.pt", **SIZES[name])
    hybrid = regard.create_model("rat_hybrid", checkpoint=tmp_path / "rat.pt", chunk_length=3)
    tokens = torch.randint(11, (1, 8))
    assert torch.equal(hybrid(tokens), model(tokens))  # a hybrid whose every layer is RAT


@pytest.mark.parametrize("name", SIZES)
def test_generates_rows_of_different_lengths_as_it_does_alone(name):
    torch.manual_seed(0)
    model = regard.create_model(name, **SIZES[name], init_std=0.3).double()
    tokens = torch.randint(11, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :4] = False
    made = generate(model, tokens, 6, key_mask=mask)
    assert torch.equal(made[:1], generate(model, tokens[:1, 4:], 6))
    assert torch.equal(made[1:], generate(model, tokens[1:], 6))


def test_layers_of_the_hybrid():
    model = regard.create_model("rat_hybrid", device="meta", **SMALL, heads=4, step=3)
    kinds = [type(block.mixer).__name__ for block in model.layers]
    assert kinds == ["Rat", "Attention", "Attention"]
    assert model.layers[1].mixer.options == {"window": (1024, 0)}
    alone = regard.create_model("rat_hybrid", device="meta", **{**SMALL, "layers": 1}, heads=4)
    assert [type(block.mixer).__name__ for block in alone.layers] == ["Rat"]
