"""States that advance together."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from regard.core.cache import KVCache
from regard.core.group import StateGroup
from regard.core.state import FORMAT, FixedState, load_state


def group(fixed=True):
    k = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = k[:, 0, :, 0] > -0.5
    parts = {"attention": KVCache.extend("op", None, k, k[..., :3], key_mask=mask)}
    if fixed:
        parts["convolution"] = FixedState("convolution", 5, {"inputs": k[:, 0, :3]})
    return StateGroup("layer", 5, parts)


def assert_same(one, other):
    assert type(one) is type(other)
    assert (one.name, one.length, list(one.parts)) == (other.name, other.length, list(other.parts))
    mine, theirs = one._pack()[0], other._pack()[0]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_group_does_what_its_parts_do():
    state = group()
    rows = torch.tensor([1, 0, 1])
    chosen = state.select(rows)
    assert torch.equal(chosen["attention"].k, state["attention"].k[rows])
    assert torch.equal(chosen["convolution"]["inputs"], state["convolution"]["inputs"][rows])
    doubled = state.map(lambda t: t.double())
    assert doubled["attention"].k.dtype == torch.float64
    assert doubled["convolution"]["inputs"].dtype == torch.float32  # sums keep their dtype
    k = state["attention"].k[:, :, :1]
    fork = state.fork()
    KVCache.extend("op", state["attention"], k, k[..., :3])
    assert KVCache.extend("op", fork["attention"], k, k[..., :3]).length == 6


def test_cropping_needs_every_past():
    shorter = group(fixed=False).crop(3)
    assert shorter.length == shorter["attention"].length == 3
    assert_same(group().crop(5), group())
    with pytest.raises(ValueError, match=r"convolution: crop\(3\) needs the past"):
        group().crop(3)


def test_parts_have_one_length():
    part = FixedState("x", 4, {})
    with pytest.raises(ValueError, match="StateGroup: parts must be states of length 5"):
        StateGroup("layer", 5, {"x": part})
    with pytest.raises(ValueError, match="named without a dot"):
        StateGroup("layer", 4, {"x.y": part})
    with pytest.raises(TypeError):
        StateGroup("layer", 4, {"x": part}).parts["y"] = part


def test_groups_of_groups_are_saved_and_loaded(tmp_path):
    model = StateGroup("model", 5, {"layer0": group(), "layer1": group(fixed=False)})
    model.save(tmp_path / "state.safetensors")
    assert_same(load_state(tmp_path / "state.safetensors"), model)
    assert_same(pickle.loads(pickle.dumps(model)), model)
    assert_same(copy.deepcopy(model), model)
    assert "KVCache" in repr(group())


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"other.k": torch.zeros(1)}, {"part": {"kind": "FixedState", "data": {}}}),
        ({}, {"part": {"kind": "Nothing", "data": {}}}),
        ({}, {"part": {"kind": "FixedState", "data": {"mechanism": "x", "length": 4}}}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, tensors, parts):
    data = json.dumps({"name": "layer", "length": 5, "parts": parts})
    header = {"format": FORMAT, "kind": "StateGroup", "data": data}
    save_file(tensors, tmp_path / "state.safetensors", header)
    with pytest.raises(ValueError, match="is damaged"):
        load_state(tmp_path / "state.safetensors")
