"""Fixed-size states; saving and loading of every state."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from regard.core import state as module
from regard.core.cache import KVCache
from regard.core.state import FORMAT, FixedState, load_state, write_atomically


def fixed():
    S = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) + 0.1
    return FixedState("linear", 7, {"S": S, "z": S.double().sum(-1)})


def cache(dtype=torch.float32):
    k = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    log_decay = -k[..., 0].float().abs()
    log_decay[:, :, 2] = -torch.inf
    operands = {"key_mask": k[:, 0, :, 0] > -0.5, "key_bias": k[..., 1], "log_decay": log_decay}
    return KVCache.extend("op", None, k, k[..., :3], **operands)


def streams(state):
    return state._pack()[0]


def assert_same(one, other):
    assert type(one) is type(other)
    assert one.length == other.length
    assert streams(one).keys() == streams(other).keys()
    for name, tensor in streams(one).items():
        assert tensor.dtype == streams(other)[name].dtype
        assert torch.equal(tensor, streams(other)[name])


def test_fork_and_crop_of_a_fixed_state():
    state = fixed()
    assert state.fork() is state
    assert state.crop(7) is state
    with pytest.raises(ValueError, match=r"linear: crop\(3\) needs the past"):
        state.crop(3)


def test_select_reorders_rows():
    chosen = fixed().select(torch.tensor([1, 0, 1], dtype=torch.int32))
    assert torch.equal(chosen["S"], fixed()["S"][[1, 0, 1]])
    assert (chosen.mechanism, chosen.length) == ("linear", 7)
    with pytest.raises(TypeError, match="linear state.select: index must be an int64 tensor"):
        fixed().select([0])


def test_map_moves_but_never_rounds_a_sum():
    state = fixed()
    assert_same(state.map(lambda t: t.to(torch.bfloat16)), state)
    assert state.map(lambda t: t.to("meta"))["S"].device.type == "meta"
    state["S"].requires_grad_()
    assert not state.map(lambda t: t.detach().half())["S"].requires_grad
    assert state.map(lambda t: t.half())["S"].requires_grad


def test_tensors_of_a_fixed_state_cannot_be_replaced():
    state, given = fixed(), {"S": torch.zeros(1)}
    with pytest.raises(TypeError):
        state.tensors["S"] = torch.zeros(1)
    other = FixedState("linear", 1, given)
    given["S"] = torch.ones(1)
    assert not other["S"].any()


def test_copies_and_pickles():
    for twin in (copy.deepcopy(fixed()), pickle.loads(pickle.dumps(fixed()))):
        assert_same(twin, fixed())
        assert twin.mechanism == "linear"


def test_a_fixed_state_under_compile():
    def step(state, x):
        S = state["S"] + x if state is not None else x
        return FixedState("linear", (state.length if state is not None else 0) + 1, {"S": S})

    compiled, state = torch.compile(step, fullgraph=True, backend="eager"), None
    for _ in range(6):
        state = compiled(state, torch.ones(2))
    assert state.length == 6
    assert state["S"].tolist() == [6.0, 6.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_comes_back_from_a_file_and_goes_on(tmp_path, dtype):
    state = cache(dtype)
    state.save(tmp_path / "state")
    loaded = load_state(str(tmp_path / "state"), device=torch.device("cpu"))
    assert_same(loaded, state)
    k = torch.zeros(2, 2, 1, 4, dtype=dtype)
    again = KVCache.extend("op", loaded, k, k[..., :3])
    assert again.length == 6
    assert torch.equal(again.decay.sums[:, :, -1], state.decay.sums[:, :, -1])


def test_only_the_past_is_saved_not_the_buffers(tmp_path):
    k = torch.zeros(1, 1, 100, 64)
    state = KVCache.extend("op", None, k, k)
    for _ in range(3):
        state = KVCache.extend("op", state, k[:, :, :1], k[:, :, :1])
    state.crop(10).save(tmp_path / "state")
    assert os.path.getsize(tmp_path / "state") < 2 * 10 * 64 * 4 + 1000


def test_a_fixed_state_comes_back_from_a_file(tmp_path):
    state = fixed().map(lambda t: t.requires_grad_())
    state.save(tmp_path / "state")
    assert_same(load_state(tmp_path / "state"), fixed())


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "nothing")


def test_foreign_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "state"

    def refused(text):
        with pytest.raises(ValueError, match=text) as caught:
            load_state(path)
        assert str(path) in str(caught.value)

    path.write_bytes(b"not at all")
    refused("is not a safetensors file")
    save_file({"k": torch.zeros(1)}, path)
    refused(f"must be a {FORMAT} file, got no format")
    save_file({"k": torch.zeros(1)}, path, {"format": "regard.state/99", "kind": "KVCache"})
    refused("got regard.state/99")
    save_file({"k": torch.zeros(1)}, path, {"format": FORMAT, "kind": "Weights"})
    refused("must hold one of KVCache, FixedState, StateGroup, got 'Weights'")
    cache().save(path)
    path.write_bytes(path.read_bytes()[:-10])
    refused("is not a safetensors file")


@pytest.mark.parametrize(
    ("change", "data"),
    [
        (lambda t: t, {"length": 4}),
        (lambda t: t, {"length": "five"}),
        (lambda t: t, {}),
        (lambda t: t, []),
        (lambda t: {"k": t["k"]}, {"length": 5}),
        (lambda t: {**t, "what": t["k"]}, {"length": 5}),
        (lambda t: {n: v for n, v in t.items() if n != "decay_first"}, {"length": 5}),
        (lambda t: {**t, "key_mask": t["key_mask"][:1]}, {"length": 5}),
        (lambda t: {**t, "key_mask": t["key_mask"][:, :4]}, {"length": 5}),
        (lambda t: {**t, "v": t["v"][0]}, {"length": 5}),
    ],
)
def test_a_cache_file_that_contradicts_itself_is_refused(tmp_path, change, data):
    tensors = {name: t.contiguous() for name, t in change(dict(streams(cache()))).items()}
    header = {"format": FORMAT, "kind": "KVCache", "data": json.dumps(data)}
    save_file({name: t.clone() for name, t in tensors.items()}, tmp_path / "state", header)
    with pytest.raises(ValueError, match="is damaged"):
        load_state(tmp_path / "state")


def test_a_header_that_is_not_json_is_damage(tmp_path):
    header = {"format": FORMAT, "kind": "FixedState", "data": "{"}
    save_file({"S": torch.zeros(1)}, tmp_path / "state", header)
    with pytest.raises(ValueError, match="is damaged"):
        load_state(tmp_path / "state")


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "state"
    fixed().save(path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache().save(path)
    assert_same(load_state(path), fixed())
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_written_files_have_the_permissions_of_any_new_file(tmp_path):
    write_atomically(tmp_path / "one", b"1")
    (tmp_path / "other").write_bytes(b"1")
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (tmp_path / "one").read_bytes() == b"1"


def test_an_interrupt_right_after_the_rename_leaves_the_new_file(tmp_path, monkeypatch):
    replace = os.replace

    def replace_then_interrupt(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
