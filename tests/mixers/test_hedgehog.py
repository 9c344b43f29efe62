"""The layer of Hedgehog and its feature maps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import regard
from mixers.subjects import DIM, check_close, tokens
from ops.hedgehog_samples import close, golden, maps_of
from regard.mixers import ELU1, Hedgehog, HedgehogFeatureMap, T2RFeatureMap
from regard.mixers.feature_maps import feature_map
from regard.mixers.hedgehog import attach, operands

CARD = regard.mechanisms["hedgehog"]
NAMES = ["linear_softmaxdim", "hybrid_sliding", "hybrid_terraced"]


def shaken(layer: nn.Module) -> nn.Module:
    """Nothing at its start."""
    make = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=make))
    return layer


def layer_of(dtype=torch.float64, **settings) -> Hedgehog:
    torch.manual_seed(0)
    settings = {"kv_heads": 2, "causal": True, **settings}
    return shaken(Hedgehog(DIM, 4, **settings)).to(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_is_the_layer_of_the_authors(name):
    tensors, config = golden(name)
    layer = Hedgehog(
        config["hidden"], config["num_heads"], config["num_kv_heads"], causal=True,
        head_dim=config["head_dim"], rope=True, feature_dim=config["feature_dim"],
        window_length=config.get("window_size"),
        options={"layout": "terraced"} if "terraced" in name else None,
    )  # fmt: skip
    found = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
    layer.load_state_dict(found)
    close(layer(tensors["in.hidden_states"]), tensors["out.student_output"], 5e-5)
    theirs = set(found) - {"window_factor"}
    assert set(layer.state_dict()) == theirs


def test_is_the_feature_map_of_flash_linear_attention():
    tensors, _ = golden("fla_feature_map")
    phi = HedgehogFeatureMap(3, 8, act="joint_softmax")
    found = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
    phi.load_state_dict(found)
    x = tensors["in.x"].requires_grad_()
    out = phi(x)
    close(out, tensors["out.phi"], 1e-5)
    out.backward(tensors["in.grad_out"])
    close(x.grad, tensors["grad.x"], 1e-4)
    close(phi.layer.weight.grad, tensors["grad.layer.weight"], 1e-4)


def test_starts_as_their_maps_start():
    phi = HedgehogFeatureMap(2, 6, 4)
    assert torch.equal(phi.mlp.layer, torch.eye(6, 4).expand(2, -1, -1))
    assert not HedgehogFeatureMap(2, 6, skip=True).mlp.layer.any()
    x = torch.randn(1, 2, 3, 6)
    close(HedgehogFeatureMap(2, 6, skip=True)(x), HedgehogFeatureMap(2, 6)(x), 1e-7)
    torch.manual_seed(0)
    random = T2RFeatureMap(3, 16)
    bound = (6 / (16 * 16)) ** 0.5
    assert 0.9 * bound < random.mlp.layer.abs().max() <= bound
    assert random.mlp.bias.shape == (1, 3, 1, 1)
    assert random.mlp.bias.abs().max() <= 2**0.5
    assert set(random.state_dict()) == {"mlp.layer", "mlp.bias"}
    shared = HedgehogFeatureMap(2, 6, act="joint_softmax")
    close(shared(x), torch.cat([2 * x, -2 * x], -1).softmax(-1), 1e-6)
    close(ELU1()(x), 1 + nn.functional.elu(x), 1e-6)
    assert not list(ELU1().parameters())


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("features", ["softmax_dim", "t2r", "elu", "joint_softmax"])
def test_goes_on_from_a_state(features, window):
    layer = layer_of(features=features, window_length=window, rope=True)
    x = tokens(2, 11)
    whole = layer(x)
    for cuts in ([4, 7], [1, 1, 9], [10, 1]):
        state, rows = None, []
        for piece in x.split(cuts, 1):
            y, state = layer(piece, state=state, return_state=True)
            rows.append(y)
        check_close(CARD, torch.cat(rows, 1), whole, "same")


def test_noncausal_and_cross_attention():
    layer = layer_of(causal=False)
    x, memory = tokens(2, 5), tokens(2, 7, seed=2)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    y = layer(x, memory, key_mask=mask)
    check_close(CARD, y[:1], layer(x[:1], memory[:1, :4]), "same")
    first, state = layer(x[:, :2], memory, key_mask=mask, return_state=True)
    check_close(CARD, torch.cat([first, layer(x[:, 2:], state=state)], 1), y, "same")
    padded = layer(torch.cat([x, x], 1), key_mask=torch.arange(10).expand(2, -1) < 5)
    check_close(CARD, padded[:, :5], layer(x), "same")


def test_tied_and_shared_maps():
    tied = layer_of(feature_options={"tie": True})
    assert tied.feature_map_k is None
    assert tied.learned()["map_k"] is tied.learned()["map_q"]
    state = {**tied.state_dict(), "feature_map_k.mlp.layer": tied.feature_map_q.mlp.layer}
    tied.load_state_dict(state)  # a checkpoint may have both
    shared = layer_of(share_key_maps=True)
    assert shared.feature_map_k.mlp.layer.shape == (2, 4, 4)
    _, state = shared(tokens(1, 3), return_state=True)
    assert state["attention"]["S"].shape[1] == 2
    _, state = layer_of()(tokens(1, 3), return_state=True)
    assert state["attention"]["S"].shape[1] == 4


def test_every_parameter_learns():
    for settings in ({"window_length": 2, "options": {"affine": True}}, {"output_norm": True}):
        layer = layer_of(**settings)
        (layer(tokens(2, 6)) * tokens(2, 6, seed=3)).sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_takes_the_norm_of_flash_linear_attention():
    layer = layer_of(features="joint_softmax", output_norm=True)
    state = layer.state_dict()
    assert "feature_map_q.layer.weight" in state
    theirs = {n.replace("o_norm.", "norm."): t for n, t in state.items()}
    other = Hedgehog(DIM, 4, 2, causal=True, features="joint_softmax", output_norm=True).double()
    other.load_state_dict(theirs)
    assert torch.equal(other(tokens(1, 4)), layer(tokens(1, 4)))


def test_attaches_to_any_module():
    tensors, config = golden("hybrid_sliding")
    module = nn.Module()
    options = attach(module, 4, 8, feature_dim=4, windowed=True)
    assert set(module.state_dict()) == {
        "feature_map_q.mlp.layer", "feature_map_k.mlp.layer", "window_factors"
    }  # fmt: skip
    assert torch.allclose(operands(module)["gamma"], torch.full((4,), 0.1))
    with torch.no_grad():
        for side in "qk":
            layer = getattr(module, f"feature_map_{side}").mlp.layer
            layer.copy_(maps_of(tensors)[f"map_{side}"])
    q, k, v = (torch.randn(1, 4, 9, 8) for _ in range(3))
    given = {**operands(module), **options, "window_length": config["window_size"]}
    assert regard.ops.hedgehog_window_attention(q, k, v, **given).shape == v.shape


def test_bfloat16_and_autocast():
    layer = layer_of(torch.bfloat16, window_length=3)
    x = tokens(2, 9, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = copy.deepcopy(layer).double()(x.double())
    check_close(CARD, y, exact, dtype=torch.bfloat16)
    wide = layer_of(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = wide(tokens(2, 9, dtype=torch.float32))
    check_close(CARD, y, wide(tokens(2, 9, dtype=torch.float32)), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "softmax"}, "kind must be one of 'softmax_dim'"),
        ({"gamma": 1.0}, "Hedgehog: gamma must be in (0, 1), got 1.0"),
        ({"causal": False, "window_length": 3}, "Hedgehog: causal must be True"),
        ({"feature_options": {"rank": 3}}, "options must be one of 'tie', 'init'"),
        ({"features": "t2r", "feature_options": {"full_space": True}}, "without 'full_space'"),
        ({"features": "elu", "feature_dim": 7}, "kind must be one with weights"),
        ({"features": "joint_softmax", "feature_options": {"skip": True}}, "skip must be False"),
        ({"feature_dim": 3, "feature_options": {"skip": True}}, "f must be 4 (d) or None"),
        ({"options": {"activation": "exp"}}, "options must be without 'activation'"),
        ({"options": {"map_q": None}}, "options must be without 'map_q'"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        Hedgehog(DIM, 4, **{"causal": True, **settings})
    assert message in str(caught.value)


def test_maps_by_name():
    for kind in ("softmax_dim", "exp_dim", "exp", "joint_softmax", "t2r"):
        phi = feature_map(kind, 2, 4, 3)
        assert phi(torch.randn(1, 2, 5, 4)).shape[-1] == phi.width
    assert feature_map("exp", 2, 4, 3, {"full_space": False}).width == 3
