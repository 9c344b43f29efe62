"""The authors' checkpoints: exactly their tensors, or nothing."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file

import regard
from regard.models import Decoder, published

SMALL = {
    "mesanet": {"dim": 16, "heads": 2, "head_dim": 6, "layers": 2, "vocabulary": 11, "mlp_dim": 20},
    "parallax": {"dim": 16, "heads": 4, "layers": 2, "vocabulary": 11, "mlp_dim": 20},
}
VARIED = {
    "mesanet": {
        "conv_bias": True, "output_gate": True, "short_conv": 3, "attention_layers": (1,),
        "attention": {"heads": 4, "kv_heads": 2, "rope": 500.0, "options": {"window": (2, 0)}},
    },
    "parallax": {"kv_heads": 2, "bias": True, "qk_norm": True, "window": 5},
}  # fmt: skip
MLP = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
BLOCK = {"attn_norm.weight", "mlp_norm.weight"} | MLP
MESA = {f"attn.{name}_proj.weight" for name in "qkvoab"} | {"attn.a_proj.bias", "attn.b_proj.bias"}
MESA |= {"attn.lambda_params", "attn.q_conv1d.weight", "attn.k_conv1d.weight", "attn.o_norm.weight"}
PARALLAX = {f"attn.{name}_proj.weight" for name in "qrkvo"}
TOP = {"model.embeddings.weight", "model.norm.weight", "lm_head.weight"}


def theirs_of(name: str, model: Decoder) -> dict[str, torch.Tensor]:
    """A model's tensors as the authors would publish them."""
    made = published[name].keys.to_theirs(model.state_dict())
    return {key: tensor.clone() for key, tensor in made.items()}


def small(name: str, seed: int = 0, **settings) -> Decoder:
    torch.manual_seed(seed)
    return regard.create_model(name, **{**SMALL[name], **settings})


def same(one: Decoder, other: Decoder) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("name", "millions", "layer"), [("mesanet", 1366.32, MESA), ("parallax", 1464.96, PARALLAX)]
)
def test_the_default_is_the_published_one(name, millions, layer):
    model = regard.create_model(name, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == millions
    keys = {f"model.layers.{i}.{key}" for i in range(24) for key in BLOCK | layer}
    theirs = published[name].keys.to_theirs(model.state_dict())
    assert set(theirs) == keys | TOP
    shapes = {key: list(tensor.shape) for key, tensor in theirs.items()}
    assert shapes["model.embeddings.weight"] == shapes["lm_head.weight"] == [32000, 2048]
    assert shapes["model.layers.23.mlp.down_proj.weight"] == [2048, 5632]
    if name == "mesanet":
        assert shapes["model.layers.0.attn.lambda_params"] == [2048]
        assert shapes["model.layers.0.attn.a_proj.bias"] == [16]
        assert shapes["model.layers.0.attn.k_conv1d.weight"] == [2048, 1, 4]
        assert shapes["model.layers.0.attn.o_norm.weight"] == [128]


@pytest.mark.parametrize("settings", [{}, VARIED], ids=["plain", "varied"])
@pytest.mark.parametrize("name", SMALL)
def test_there_and_back(name, settings, tmp_path):
    model = small(name, **settings.get(name, {}))
    path = tmp_path / "published.safetensors"
    save_file(theirs_of(name, model), path)
    sizes = {**SMALL[name], **settings.get(name, {})}
    again = regard.create_model(name, checkpoint=path, **sizes)
    assert same(again, model)
    tokens = torch.randint(11, (1, 6))
    assert torch.equal(again(tokens), model(tokens))
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_names_of_the_variations():
    keys = set(theirs_of("parallax", small("parallax", **VARIED["parallax"])))
    for n in "qrkv":
        assert f"model.layers.1.attn.{n}_proj.bias" in keys
    assert {f"model.layers.0.attn.{n}_norm.weight" for n in "qrk"} <= keys
    keys = set(theirs_of("mesanet", small("mesanet", **VARIED["mesanet"])))
    assert {f"model.layers.0.attn.{n}_conv1d.bias" for n in "qk"} <= keys
    assert "model.layers.0.attn.g_proj.weight" in keys
    second = {key.removeprefix("model.layers.1.attn.") for key in keys if "layers.1.attn." in key}
    assert second == {f"{n}_proj.weight" for n in "qkvo"}


def pieces(folder, tensors):
    """As large checkpoints are published."""
    names = sorted(tensors)
    shares = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, share in shares.items():
        save_file({name: tensors[name] for name in share}, folder / file)
    places = {name: file for file, share in shares.items() for name in share}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("kind", ["bin", "wrapped", "pieces", "folder", "folder of bin"])
def test_every_shape_of_a_checkpoint(kind, tmp_path):
    model = small("mesanet")
    tensors = theirs_of("mesanet", model)
    path = tmp_path / "weights.pt"
    if kind == "bin":
        torch.save(tensors, path)
    elif kind == "wrapped":
        torch.save({"state_dict": tensors, "step": 3}, path)
    elif kind == "pieces":
        path = pieces(tmp_path, tensors)
    elif kind == "folder":
        save_file(tensors, tmp_path / "model.safetensors")
        path = tmp_path
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        path = tmp_path
    assert same(regard.create_model("mesanet", checkpoint=path, **SMALL["mesanet"]), model)


def test_dtype_is_that_of_the_checkpoint_unless_told(tmp_path):
    path = tmp_path / "half.safetensors"
    model = small("parallax")
    save_file({k: t.bfloat16() for k, t in theirs_of("parallax", model).items()}, path)
    found = regard.create_model("parallax", checkpoint=path, **SMALL["parallax"])
    assert found.embed.weight.dtype == torch.bfloat16
    settings = {"checkpoint": path, "dtype": torch.float64, **SMALL["parallax"]}
    found = regard.create_model("parallax", **settings)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float64}
    assert torch.equal(found.norm.weight, model.norm.weight.double())


# -- config.json -----------------------------------------------------------------------------------

MESANET_JSON = {
    "model_type": "mesa_net", "hidden_size": 16, "num_hidden_layers": 3, "num_heads": 2,
    "head_dim": 6, "intermediate_size": 20, "vocab_size": 11, "norm_eps": 1e-6,
    "use_output_gate": True, "use_short_conv": True, "conv_size": 3, "conv_bias": True,
    "lambda_lower_bound": 0.5, "tie_word_embeddings": True, "initializer_range": 0.1,
    "hidden_act": "swish",
    "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 8},
}  # fmt: skip
PARALLAX_JSON = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "hidden_ratio": 2, "intermediate_size": None, "vocab_size": 11, "qkv_bias": True,
    "qk_norm": True, "window_size": 5, "rope_theta": 500.0, "attnres_block_size": None,
}  # fmt: skip


def test_sizes_come_from_the_folder(tmp_path):
    sizes = published["mesanet"].settings(MESANET_JSON)
    config = published["mesanet"].config(**sizes)
    assert [config.mixer(i).kind for i in range(3)] == ["mesa", "attention", "mesa"]
    assert config.mixer(0).options["least_ridge"] == 0.5
    assert config.mixer(1).options == {
        "heads": 4, "kv_heads": 2, "rope": 1e4, "options": {"window": (7, 0)}
    }  # fmt: skip
    model = regard.create_model("mesanet", **sizes)
    save_file(theirs_of("mesanet", model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MESANET_JSON))
    found = regard.create_model("mesanet", checkpoint=tmp_path)
    assert found.config == model.config
    assert same(found, model)


def test_parallax_from_its_config():
    config = published["parallax"].config(**published["parallax"].settings(PARALLAX_JSON))
    options = config.mixer(0).options
    assert options["options"] == {"window": (4, 0)}
    assert (options["rope"], options["bias"], options["qk_norm"]) == (500.0, True, True)
    assert config.hidden == 256


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("parallax", {**PARALLAX_JSON, "attnres_block_size": 4}, "None in attnres_block_size"),
        ("parallax", {**PARALLAX_JSON, "hidden_act": "relu"}, "'swish' in hidden_act"),
        ("parallax", MESANET_JSON, "'parallax' in model_type, got 'mesa_net'"),
        ("mesanet", {**MESANET_JSON, "attn": {"layers": [0], "qkv_bias": True}}, "attn.qkv_bias"),
    ],
)
def test_what_is_not_built_is_refused(name, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        published[name].settings(config)


# -- refused --------------------------------------------------------------------------------------


def load(path, name="parallax", **settings):
    return regard.create_model(name, checkpoint=path, **{**SMALL[name], **settings})


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    tensors = theirs_of("parallax", small("parallax"))
    tensors["extra"] = tensors.pop("model.layers.1.attn.r_proj.weight")
    tensors["model.norm.weight"] = torch.zeros(17)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match="checkpoint must be that of exactly this model") as caught:
        load(path)
    assert "no model.layers.1.attn.r_proj.weight" in str(caught.value)
    assert "the unknown extra" in str(caught.value)
    assert "model.norm.weight [17] instead of [16]" in str(caught.value)


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(theirs_of("mesanet", small("mesanet")), path)
    with pytest.raises(ValueError, match=r"no model\.layers\.0\.attn\.r_proj\.weight"):
        load(path)
    with pytest.raises(ValueError, match=r"\[11, 16\] instead of \[11, 32\]"):
        load(path, dim=32)


def test_a_repeated_head_must_be_the_embedding(tmp_path):
    model = small("parallax", tied=True)
    tensors = theirs_of("parallax", model)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"].clone()
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    assert same(load(path, tied=True), model)
    tensors["lm_head.weight"] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"the unknown lm_head\.weight"):
        load(path, tied=True)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["cut", "text", "number", "code", "empty", "ours"])
def test_a_broken_or_foreign_file_is_refused(kind, tmp_path):
    path, trap = tmp_path / "x.pt", tmp_path / "trap"
    if kind == "cut":
        path = tmp_path / "x.safetensors"
        save_file(theirs_of("parallax", small("parallax")), path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "number":
        torch.save({"x": 3}, path)
    elif kind == "code":
        torch.save({"x": Evil(trap)}, path)
    elif kind == "empty":
        path = tmp_path
    else:
        small("parallax").save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="create_model: "):
        load(path)
    assert not trap.exists()


def test_an_index_stays_in_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for places, message in (
        ({"a": "../x.safetensors"}, "which is not in its folder"),
        ({"a": "gone.safetensors"}, "lacks gone.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is no index of a checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "3", '{"attn": {"layers": [0]}}'])
def test_a_broken_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"create_model: .*(config\.json|num_heads)"):
        regard.create_model("mesanet", checkpoint=tmp_path)


def test_a_path_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="checkpoint gone does not exist"):
        load("gone")
