"""FreeSwim: the authors' passes, the paths, and the way to a larger size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from golden_files import parts, settings
from regard.models import published
from regard.models.wan import Wan, WanConfig
from regard.ops import softmax_attention
from regard.steer.freeswim import DualPath, entropy_scale, flow_sigmas, resize, upscale

SCALE = entropy_scale(12, 1560)


def official(name: str, **options) -> tuple[Wan, DualPath, dict[str, dict[str, Tensor]]]:
    file, config = parts(f"freeswim/{name}"), settings(f"freeswim/{name}")
    variant = published["wan_1_3b"]
    assert variant.settings is not None
    model = Wan(variant.config(**variant.settings(config))).eval()
    model.load_state_dict(file["state"])
    grid = model.grid(file["in"]["latents"])
    half = config["d_h"], config["d_w"]
    return model, DualPath(model, grid, half, scale=SCALE, **options), file


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_official_passes() -> None:
    model, dual, file = official("dual_nocache")
    given = file["in"]
    twice = torch.cat([given["latents"]] * 2)
    for step in (0, 1, 7):
        with dual.at(step):
            assert close(model(twice, given["timestep"], given["text"]), file["out"]["cond"])
        with dual.at(step, conditional=False):
            out = model(twice, given["timestep"], given["negative_text"])
        assert close(out, file["out"]["uncond"])


@torch.no_grad()
def test_official_passes_with_a_cache() -> None:
    model, dual, file = official("dual_cache", refresh_every=2)
    given, out = file["in"], file["out"]
    twice = torch.cat([given["latents"]] * 2)
    with dual.at(0):
        assert close(model(twice, given["timestep"], given["text"]), out["cond_refresh"])
    for number, kept in enumerate(dual._kept):
        assert kept is not None
        assert close(kept.transpose(1, 2), out[f"cached_cross_{number}"])
    with dual.at(0, conditional=False):
        found = model(twice, given["timestep"], given["negative_text"])
    assert close(found, out["uncond"])
    later = torch.cat([given["latents_next"]] * 2)
    assert dual.paths(1) == 1
    with dual.at(1):
        found = model(later, given["timestep"] - 40, given["text"])
        assert close(found, out["cond_reuse"])
        # Both paths are the window path: half of the batch will do.
        alone = model(later[:1], given["timestep"] - 40, given["text"])
    assert close(alone, out["cond_reuse"][:1])


@torch.no_grad()
def test_a_refresh_in_every_step_is_no_cache() -> None:
    model, dual, file = official("dual_nocache", refresh_every=1)
    given = file["in"]
    for step in range(3):
        with dual.at(step):
            out = model(torch.cat([given["latents"]] * 2), given["timestep"], given["text"])
        assert close(out, file["out"]["cond"])


@torch.no_grad()
@pytest.mark.parametrize("refresh_every", [None, 2])
def test_several_prompts_are_as_one_after_the_other(refresh_every: int | None) -> None:
    torch.manual_seed(0)
    model, dual, file = official("dual_cache", refresh_every=refresh_every)
    x, text = torch.randn(3, 4, 2, 12, 16), torch.randn(3, 5, 10)
    time = file["in"]["timestep"]

    def run(latents: Tensor, prompts: Tensor) -> Tensor:
        dual.clear()
        found = []
        for step, conditional in ((0, True), (0, False), (1, True)):
            copies = dual.paths(step, conditional)
            with dual.at(step, conditional):
                given = (torch.cat([part] * copies) for part in (latents, prompts))
                latent, prompt = given
                found.append(model(latent, time, prompt)[: len(latents)])
        return torch.stack(found)

    together = run(x, text)
    alone = torch.cat([run(x[i : i + 1], text[i : i + 1]) for i in range(3)], 1)
    assert torch.allclose(together, alone, atol=1e-5)


@torch.no_grad()
def test_paths_differ_and_share_the_cross_attention_of_the_full_one() -> None:
    model, dual, file = official("dual_nocache")
    given, seen = file["in"], []
    projection = model.blocks[0].attn2.to_out[0]
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    twice = torch.cat([given["latents"]] * 2)
    with dual.at(0):
        out = model(twice, given["timestep"], given["text"])
    hook.remove()
    assert torch.equal(seen[0][0], seen[0][1])
    assert not torch.allclose(out[0], out[1], atol=1e-4)
    plain = model(given["latents"], given["timestep"], given["text"])
    assert not torch.allclose(out[1:], plain, atol=1e-5)  # the scale is another


@torch.no_grad()
def test_a_window_as_large_as_the_grid_is_the_model_itself() -> None:
    model, _, file = official("dual_nocache")
    given = file["in"]
    grid = model.grid(given["latents"])
    dual = DualPath(model, grid, (grid[1], grid[2]))
    with dual.at(0):
        out = model(torch.cat([given["latents"]] * 2), given["timestep"], given["text"])
    plain = model(given["latents"], given["timestep"], given["text"])
    assert torch.allclose(out, plain.expand_as(out), atol=1e-5)


@torch.no_grad()
def test_layers_are_as_before_afterwards() -> None:
    model, dual, file = official("dual_cache", refresh_every=3, guided_steps=4)
    given = file["in"]
    call = (given["latents"], given["timestep"], given["text"])
    before = model(*call)

    def broken() -> None:
        with dual.at(0):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="middle"):
        broken()
    assert all(block.attn1.attend is softmax_attention for block in model.blocks)
    assert torch.equal(model(*call), before)
    assert [dual.paths(step) for step in range(6)] == [2, 1, 1, 2, 1, 1]
    assert [dual.paths(step, conditional=False) for step in range(4)] == [1, 1, 1, 1]
    with dual.at(5):  # behind the guided steps: the window path, with its own cross-attention
        alone = model(*call)
    window = DualPath(model, dual.grid, dual.half, scale=SCALE, guided_steps=0)
    with window.at(0):
        assert torch.equal(model(*call), alone)


@torch.no_grad()
def test_any_model_whose_attention_is_a_function() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = softmax_attention

    own, cross = Layer(), Layer()
    dual = DualPath([(own, cross)], (6, 8), 1)
    q, k, v = torch.randn(3, 2, 2, 48, 4)
    text = torch.randn(2, 2, 3, 4)
    with dual.at(0):
        out, shared = own.attend(q, k, v), cross.attend(q, text, text)
    assert torch.allclose(out[1], softmax_attention(q, k, v)[1], atol=1e-6)
    assert not torch.allclose(out[0], softmax_attention(q, k, v)[0], atol=1e-3)
    assert torch.equal(shared[0], shared[1])


def test_refusals() -> None:
    model = Wan(
        WanConfig(heads=1, head_dim=6, layers=1, mlp_dim=4, channels=1, channels_out=1,
                  text_dim=2, freq_dim=2)
    )  # fmt: skip
    grid = (1, 4, 4)
    for given, options, message in (
        ((nn.Linear(2, 2), grid, 1), {}, "layers must be"),
        (([], grid, 1), {}, "layers must be"),
        ((model, (4,), 1), {}, "grid must be"),
        ((model, grid, -1), {}, "half must be"),
        ((model, grid, (1, 2, 3)), {}, "half must be"),
        ((model, grid, 1), {"refresh_every": 0}, "refresh_every must be"),
        ((model, (4, 4), 1), {"time_half": 1}, "time_half must be"),
        ((model, grid, 1), {"scale": float("nan")}, "scale must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            DualPath(*given, **options)
    dual = DualPath(model, grid, 1, refresh_every=2)
    with pytest.raises(ValueError, match="step must be behind one that refreshes"), dual.at(1):
        pass
    x, time, text = torch.randn(3, 1, 1, 8, 8), torch.tensor([1.0]), torch.randn(1, 2, 2)
    with pytest.raises(ValueError, match="every latent twice"), dual.at(0):
        model(x, time, text)
    with dual.at(0):
        model(torch.cat([x[:2], x[:2]]), time, text)
    with pytest.raises(ValueError, match="as when it was kept"), dual.at(1):
        model(x, time, text)


def test_noise_levels() -> None:
    sigmas = flow_sigmas(50, 9.0, strength=0.7)
    assert len(sigmas) == 36
    assert sigmas[-1] == 0
    whole = flow_sigmas(50, 9.0)
    assert torch.equal(whole[-36:], sigmas)
    assert bool((whole.diff() < 0).all())
    for options in ({"strength": 0.0}, {"strength": 1.5}, {"shift": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            flow_sigmas(4, **options)


def test_upscaling_a_known_velocity() -> None:
    """With the velocity of one point the sampler arrives there, guided or not."""
    goal = torch.randn(1, 2, 3, 8, 8)
    sigmas = flow_sigmas(6, strength=0.5)

    def toward(x: Tensor, time: Tensor) -> Tensor:
        return (x - goal) / (time / 1000)

    start = resize(torch.randn(1, 2, 3, 4, 4), (8, 8))
    assert start.shape == goal.shape
    for negative in (None, toward):
        out = upscale(toward, start, sigmas, negative=negative)
        assert torch.allclose(out, goal, atol=1e-4)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    lazy = lambda x, time: torch.zeros_like(x)  # noqa: E731
    first, again, other = (upscale(lazy, start, sigmas, generator=seed) for seed in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="sigmas must be"):
        upscale(toward, start, torch.ones(1))


def test_upscaling_with_two_paths_runs_each_pass_once() -> None:
    torch.manual_seed(0)
    model, dual, file = official("dual_cache", refresh_every=2)
    given, sizes = file["in"], []

    def with_prompt(name: str):
        def predict(x: Tensor, time: Tensor) -> Tensor:
            sizes.append(len(x))
            return model(x, time, given[name])

        return predict

    out = upscale(
        with_prompt("text"), given["latents"], flow_sigmas(3), dual=dual,
        negative=with_prompt("negative_text"), guidance=2.0,
    )  # fmt: skip
    assert out.shape == given["latents"].shape
    assert out.isfinite().all()
    assert sizes == [2, 1, 1, 1, 2, 1]  # full path in steps 0 and 2, never without guidance
