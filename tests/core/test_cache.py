"""The key-value cache against plain concatenation, and what its sharing of buffers must not do."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

from regard.core.cache import SMALLEST, KVCache
from regard.core.decay import decay_sums

B, HK, H, D, DV = 2, 2, 4, 3, 5
STREAMS = ("key_mask", "key_bias", "log_decay")


def tokens(count, seed, streams=STREAMS, dtype=torch.float32, **options):
    """k, v and the named key-side operands of `count` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, **options).to(dtype)

    made = {"k": normal(B, HK, count, D), "v": normal(B, HK, count, DV)}
    if "key_mask" in streams:
        made["key_mask"] = torch.rand(B, count, generator=generator) < 0.8
    if "key_bias" in streams:
        made["key_bias"] = normal(B, H, count)
    if "log_decay" in streams:
        steps = -torch.rand(B, HK, count, generator=generator)
        forget = torch.rand(B, HK, count, generator=generator) < 0.1
        made["log_decay"] = torch.where(forget, -torch.inf, steps)
    return made


def extend(state, new):
    return KVCache.extend("op", state, **new)


def joined(parts):
    """What a cache of these parts must hold: plain concatenation, neutral where not given."""
    neutral = {"key_mask": (B,), "key_bias": (B, H), "log_decay": (B, HK)}
    held = {name: torch.cat([part[name] for part in parts], 2) for name in ("k", "v")}
    for name, shape in neutral.items():
        if any(name in part for part in parts):
            filled = [
                part[name]
                if name in part
                else torch.full((*shape, part["k"].shape[2]), name == "key_mask").to(
                    torch.bool if name == "key_mask" else torch.float32
                )
                for part in parts
            ]
            held[name] = torch.cat(filled, -1)
    if "log_decay" in held:
        held["decay"] = decay_sums(held.pop("log_decay"), held.get("key_mask"))
    return held


def assert_holds(state, parts):
    held = joined(parts)
    assert state.length == held["k"].shape[2]
    for name in ("k", "v", "key_mask", "key_bias"):
        found = getattr(state, name)
        if name in held:
            assert torch.equal(found, held[name]), name
        else:
            assert found is None
    if "decay" in held:
        torch.testing.assert_close(state.decay.sums, held["decay"].sums, rtol=0, atol=1e-12)
        assert torch.equal(state.decay.first, held["decay"].first)
    else:
        assert state.decay is None


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_splits_with_operands_that_come_late_or_go_missing(seed, grad):
    chance, state, parts = random.Random(seed), None, []
    with torch.set_grad_enabled(grad):
        for step in range(7):
            count = chance.choice([0, 1, 1, 2, 5, 70])
            streams = [name for name in STREAMS if chance.random() < 0.4]
            new = tokens(count, 100 * seed + step, streams)
            if grad and chance.random() < 0.5:
                new["k"].requires_grad_()
            older, known = state, list(parts)
            state = extend(state, new)
            parts.append(new)
            assert_holds(state, parts)
            if older is not None:
                assert_holds(older, known)


def test_a_long_decode_moves_the_buffers_a_logarithmic_number_of_times():
    state, places = None, set()
    for step in range(1000):
        state = extend(state, tokens(1, step, ("key_bias",)))
        places.add(state._buffers)
    assert len(places) == len([c for c in (64, 128, 256, 512, 1024) if c >= SMALLEST])
    assert state._buffers.capacity < 2 * 1000 + SMALLEST
    assert_holds(state, [tokens(1, step, ("key_bias",)) for step in range(1000)])


def needs_grad(new):
    return {**new, "k": new["k"].clone().requires_grad_()}


@pytest.mark.parametrize("change", ["write", "grow", "stream", "grad"])
def test_continuing_one_state_twice_raises_whichever_way_it_grew(change):
    state = extend(None, tokens(3, 0, ()))
    new = {
        "write": tokens(1, 1, ()),
        "grow": tokens(SMALLEST, 1, ()),
        "stream": tokens(1, 1, ("key_mask",)),
        "grad": needs_grad(tokens(1, 1, ())),
    }[change]
    longer = extend(state, new)
    text = rf"op: this state \(length 3\) was already continued, to length {longer.length}; .*fork"
    with pytest.raises(ValueError, match=text):
        extend(state, tokens(1, 2, ()))
    assert_holds(state, [tokens(3, 0, ())])
    assert_holds(longer, [tokens(3, 0, ()), new])


def test_a_continuation_that_failed_can_be_tried_again(monkeypatch):
    def out_of_memory(*_):
        raise MemoryError

    state = extend(None, tokens(3, 0, ()))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", out_of_memory)
        with pytest.raises(MemoryError):
            extend(state, tokens(1, 1, ()))
    assert_holds(extend(state, tokens(1, 1, ())), [tokens(3, 0, ()), tokens(1, 1, ())])


def test_forks_go_their_own_ways():
    parts = [tokens(5, 0)]
    state = extend(None, parts[0])
    forks = [state.fork(), state.fork(), state]
    ends = [extend(fork, tokens(2, 10 + i)) for i, fork in enumerate(forks)]
    for i, end in enumerate(ends):
        assert_holds(end, [*parts, tokens(2, 10 + i)])
    for fork in forks:
        assert_holds(fork, parts)


@pytest.mark.parametrize("length", range(8))
def test_crop_goes_back_and_leaves_later_states_alone(length):
    whole = tokens(7, 0)
    state = extend(None, whole)
    later = extend(state, tokens(1, 1))
    axis = {"k": 2, "v": 2, "key_mask": 1, "key_bias": 2, "log_decay": 2}
    past = [{name: t.narrow(axis[name], 0, length) for name, t in whole.items()}]
    cropped = later.crop(length)
    assert_holds(cropped, past)
    assert_holds(extend(cropped, tokens(3, 2)), [*past, tokens(3, 2)])
    assert_holds(later, [whole, tokens(1, 1)])
    assert_holds(extend(later, tokens(1, 3)), [whole, tokens(1, 1), tokens(1, 3)])


@pytest.mark.parametrize("length", [-1, 4, True, 1.0, None])
def test_crop_refuses_what_is_not_past(length):
    state = extend(None, tokens(3, 0))
    with pytest.raises((ValueError, TypeError), match="KVCache.crop: length must be"):
        state.crop(length)


def test_select_reorders_rows_and_may_be_continued():
    whole, index = tokens(4, 0), torch.tensor([1, 1, 0])
    state = extend(None, whole)
    chosen = state.select(index)
    for name in ("k", "v", "key_mask", "key_bias"):
        assert torch.equal(getattr(chosen, name), whole[name][index])
    assert torch.equal(chosen.decay.sums, state.decay.sums[index])
    more = extend(chosen, {name: t[index] for name, t in tokens(2, 1).items()})
    assert torch.equal(more.k, torch.cat([whole["k"], tokens(2, 1)["k"]], 2)[index])
    for bad in (torch.tensor(1), torch.tensor([True, False]), [0, 1], torch.tensor([0.0])):
        with pytest.raises(TypeError, match="KVCache.select: index must be an int64 tensor"):
            state.select(bad)


def test_map_changes_keys_and_values_and_rounds_nothing_else():
    """A first visible key of 301 would come back from bfloat16 as 300."""
    log_decay = torch.full((B, HK, 400), -1.1)
    log_decay[:, :, 301] = -torch.inf
    state = extend(None, {**tokens(400, 0, ("key_mask", "key_bias")), "log_decay": log_decay})
    small = state.map(lambda t: t.to(torch.bfloat16))
    assert small.k.dtype == small.v.dtype == torch.bfloat16
    assert torch.equal(small.key_mask, state.key_mask)
    assert torch.equal(small.key_bias, state.key_bias)
    assert torch.equal(small.decay.sums, state.decay.sums)
    assert torch.equal(small.decay.first, state.decay.first)
    assert small.map(lambda t: t.to("meta")).decay.first.device.type == "meta"
    grown = extend(None, needs_grad(tokens(2, 0)))
    assert not grown.map(lambda t: t.detach()).k.requires_grad


def test_a_mapped_view_is_copied_before_it_grows():
    state = extend(None, tokens(3, 0))
    one, other = state.map(lambda t: t), extend(state, tokens(1, 1))
    assert_holds(extend(one, tokens(1, 2)), [tokens(3, 0), tokens(1, 2)])
    assert_holds(other, [tokens(3, 0), tokens(1, 1)])


@pytest.mark.parametrize("grad", [False, True])
def test_the_cache_never_aliases_what_the_caller_holds(grad):
    new = tokens(3, 0)
    if grad:
        new["v"].requires_grad_()
    state = extend(None, new)
    with torch.no_grad():
        for tensor in new.values():
            tensor.zero_()
    assert_holds(state, [tokens(3, 0)])


def test_gradients_flow_to_every_token_and_operand():
    parts = [tokens(n, n) for n in (2, 3, 1)]
    leaves = []
    for part in parts:
        for name in ("k", "v", "key_bias", "log_decay"):
            leaves.append(part[name].requires_grad_())
    state = None
    for part in parts:
        state = extend(state, part)
    held = (state.k, state.v, state.key_bias, state.decay.sums)
    gradients = torch.autograd.grad(sum(t.double().square().sum() for t in held), leaves)
    whole = joined(parts)
    held = (whole["k"], whole["v"], whole["key_bias"], whole["decay"].sums)
    expected = torch.autograd.grad(sum(t.double().square().sum() for t in held), leaves)
    for one, other in zip(gradients, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)


def test_writing_new_tokens_does_not_spoil_what_autograd_saved():
    """Queries may need a gradient where keys do not: the backward pass then reads old states."""
    q = torch.randn(B, HK, 2, D, requires_grad=True)
    state, total, keys = None, torch.zeros(()), []
    for step in range(4):
        keys.append(tokens(1, step, ())["k"])
        state = extend(state, tokens(1, step, ()))
        total = total + (q @ state.k.mT).square().sum()
    (gradient,) = torch.autograd.grad(total, q)
    plain = sum((q @ torch.cat(keys[: n + 1], 2).mT).square().sum() for n in range(4))
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, q)[0])


def test_states_cross_the_border_of_inference_mode():
    with torch.inference_mode():
        inside = extend(None, tokens(3, 0))
        assert_holds(extend(inside.fork(), tokens(1, 1)), [tokens(3, 0), tokens(1, 1)])
    with torch.no_grad():
        assert_holds(extend(inside.fork(), tokens(1, 1)), [tokens(3, 0), tokens(1, 1)])
    outside = extend(inside, tokens(1, 1))
    assert not outside.k.is_inference()
    grown = extend(outside, needs_grad(tokens(1, 2)))
    grown.k.sum().backward()
    with torch.inference_mode():
        again = extend(grown, tokens(2, 3))
    assert_holds(again, [tokens(3, 0), tokens(1, 1), tokens(1, 2), tokens(2, 3)])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda n: {**n, "k": n["k"][:, :1]},
            r"k must be the state's float32 \[2, 2, ., 3\] on cpu",
        ),
        (lambda n: {**n, "v": n["v"][..., :4]}, r"v must be the state's float32 \[2, 2, ., 5\]"),
        (lambda n: {**n, "k": n["k"].half()}, "k must be the state's float32"),
        (lambda n: {**n, "v": n["v"].to("meta")}, "v must be the state's float32"),
        (lambda n: {**n, "key_bias": n["key_bias"][:, :1]}, "key_bias must be of the state's 4 "),
        (
            lambda n: {**n, "key_bias": n["key_bias"].double()},
            "key_bias must be of the state's dtype",
        ),
        (
            lambda n: {**n, "log_decay": n["log_decay"][:, :1]},
            "log_decay must be of the state's 2 ",
        ),
    ],
)
def test_new_tokens_that_do_not_fit_the_state_are_refused(change, text):
    state = extend(None, tokens(3, 0))
    with pytest.raises(ValueError, match=f"op: {text}"):
        extend(state, change(tokens(1, 1)))
    assert_holds(extend(state, tokens(1, 1)), [tokens(3, 0), tokens(1, 1)])


def test_copies_and_pickles_are_states_of_their_own():
    state = extend(None, tokens(3, 0))
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert_holds(extend(twin, tokens(1, 1)), [tokens(3, 0), tokens(1, 1)])
    assert_holds(extend(state, tokens(1, 2)), [tokens(3, 0), tokens(1, 2)])


def test_decoding_under_compile_equals_eager_and_compiles_few_times():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def step(state, k, v, log_decay):
        state = extend(state, {"k": k, "v": v, "log_decay": log_decay})
        return state, (state.k * state.decay.sums[..., None].float().exp()).sum()

    compiled = torch.compile(step, fullgraph=True, backend=count)
    state = plain = None
    for seed in range(12):
        new = tokens(1, seed, ("log_decay",))
        older = state
        state, found = compiled(state, **new)
        plain, expected = step(plain, **new)
        torch.testing.assert_close(found, expected)
    assert len(graphs) <= 4
    assert_holds(state, [tokens(1, seed, ("log_decay",)) for seed in range(12)])
    with pytest.raises(ValueError, match="already continued"):
        extend(older, tokens(1, 0, ("log_decay",)))


def test_vmap_over_new_tokens_of_one_state():
    state, new = extend(None, tokens(3, 0, ())), torch.randn(4, B, HK, 1, D)

    def total(k):
        longer = extend(state.fork(), {"k": k, "v": torch.zeros(B, HK, 1, DV)})
        return longer.k.sum((1, 2, 3))

    found = torch.vmap(total)(new)
    torch.testing.assert_close(found, state.k.sum((1, 2, 3)) + new.sum((2, 3, 4)))


def test_repr_shows_sizes_not_contents():
    state = extend(None, tokens(3, 0))
    assert repr(state) == "KVCache(length=3, k=float32 Tensor[2, 2, 3, 3] on cpu)"
