"""What the mechanisms regress, at the published sizes, on one GPU.

Run: python benchmarks/train_gpu.py FOLDER [--minutes 5]
     python benchmarks/train_gpu.py FOLDER --dry-run      (on a processor, tiny)

1. In-context regression: two layers without MLP learn to regress streams of 32-dimensional pairs,
   always fresh ones; local linear, softmax and MesaNet for equally many steps, three seeds each.
   How many steps the minutes allow is measured first and kept in FOLDER/plan.json.
2. Test-time regression: nothing is trained, 1024 pairs of 8, 16, 32, 64 dimensions.

Every mechanism and every dimension is a file of its own in FOLDER: what is there is not made
again. In the end FOLDER/regression_gpu.json holds all of it; docs/figures/regression_gpu.py draws
it. Where three seeds are one computation (`torch.vmap` over their parameters) they give what each
gives alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from regard.bench.kernels.result import facts
from regard.bench.measure.plain import as_json
from regard.bench.regression import tuned_scores
from regard.core.state import write_atomically
from regard.mixers import Attention, LocalLinear, Mesa
from regard.recipes import Optimiser
from regard.tasks import InContextRegression

SHARE = 0.8  # of the minutes, for steps; the rest is starting, measuring and evaluating


@dataclass(frozen=True)
class Setting:
    """Sizes of the training and of what follows it."""

    dim: int = 32
    segment: int = 128
    length: int = 384
    width: int = 128
    heads: int = 4
    layers: int = 2
    batch: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    most_steps: int = 3000
    learning_rate: float = 3e-3
    warmup: int = 50
    evaluated: int = 8  # batches
    untrained_length: int = 1024
    untrained_segment: int = 128
    untrained_dims: tuple[int, ...] = (8, 16, 32, 64)
    impl: str = "auto"  # of local linear attention while training

    @property
    def task(self) -> InContextRegression:
        """Cluster streams: regions tell the maps apart."""
        return InContextRegression(dim=self.dim, segment=self.segment, length=self.length)

    @property
    def optimiser(self) -> Optimiser:
        """Adam with a warm-up, then a cosine to 0."""
        return Optimiser(self.learning_rate, warmup=self.warmup, schedule="cosine")


TINY = Setting(
    dim=4, segment=12, length=24, width=16, heads=2, batch=4, seeds=(0, 1), most_steps=4,
    warmup=1, evaluated=1, untrained_length=24, untrained_segment=8, untrained_dims=(3,),
)  # fmt: skip


def local_linear(s: Setting) -> nn.Module:
    """Ridge and bandwidth are learned; nothing is forgotten."""
    return LocalLinear(s.width, s.heads, causal=True, options={"impl": s.impl})


def softmax(s: Setting) -> nn.Module:
    """Queries and keys normalised with a learned gain, as in local linear."""
    return Attention(s.width, s.heads, mechanism="softmax", causal=True, qk_norm=True)


def mesa(s: Setting) -> nn.Module:
    """MesaNet's layer, but for two things that would keep it from regressing.

    No norm of the output, which hides the size of a prediction, and no convolution, as a token
    holds its pair already. Decays start at 0.95. One chunk is the fastest on a GPU.
    """
    options = {"solver": "cg", "chunk_size": s.length}
    layer = Mesa(s.width, s.heads, causal=True, short_conv=0, options=options)
    layer.o_norm = None
    gate = layer.operands["log_decay"]
    assert isinstance(gate, nn.Linear)
    nn.init.constant_(gate.bias, 3.0)
    return layer


MECHANISMS: dict[str, Callable[[Setting], nn.Module]] = {
    "local_linear": local_linear,
    "mesa": mesa,
    "softmax": softmax,
}


class Regressor(nn.Module):
    """Token t is (x_t, x_{t-1}, y_{t-1}): a query, and the newest pair. Two layers, no MLP.

    A causal layer then sees what a strictly causal predictor sees, and it is a matter of its
    projections to take queries from the first part and keys and values from the others.
    """

    def __init__(self, make: Callable[[Setting], nn.Module], setting: Setting) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * setting.dim, setting.width, bias=False)
        self.layers = nn.ModuleList(make(setting) for _ in range(setting.layers))
        self.out = nn.Linear(setting.width, setting.dim, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Predictions of y [B, n, d]."""
        before = [torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1) for z in (x, y)]
        h = self.embed(torch.cat([x, *before], 2))
        for layer in self.layers:
            h = h + layer(h)
        return self.out(h)


class Together:
    """Models of several seeds as one computation, each with its data and its own gradient clip."""

    def __init__(self, name: str, setting: Setting, device: str) -> None:
        models = []
        for seed in setting.seeds:
            torch.manual_seed(seed)
            models.append(Regressor(MECHANISMS[name], setting).to(device))
        self.name, self.models, self.device = name, models, device
        stacked = stack_module_state(models)[0]
        self.parameters = {n: p.detach().requires_grad_() for n, p in stacked.items()}
        self.base = Regressor(MECHANISMS[name], setting).to("meta")
        settings = setting.optimiser
        self.adam = torch.optim.AdamW(
            self.parameters.values(), settings.learning_rate, betas=settings.betas,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.clip = settings.clip
        self.data = [torch.Generator(device).manual_seed(seed) for seed in setting.seeds]

    def predict(self, x: Tensor, y: Tensor) -> Tensor:
        """[seeds, B, n, d] each."""

        def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return functional_call(self.base, parameters, (x, y))

        if self.name != "softmax":
            return vmap(one)(self.parameters, x, y)
        # torch's own kernels have no batching rule, and starting them is no cost.
        alone = [{n: p[i] for n, p in self.parameters.items()} for i in range(len(x))]
        return torch.stack([one(*each) for each in zip(alone, x, y, strict=True)])

    def sample(self, task: InContextRegression, batch: int) -> tuple[Tensor, Tensor]:
        """Fresh streams for every seed."""
        pairs = [task.sample(batch, generator).inputs for generator in self.data]
        x, y = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return x, y

    def step(self, setting: Setting, rate: float) -> Tensor:
        """One update; the losses [seeds], not yet on the host."""
        x, y = self.sample(setting.task, setting.batch)
        losses = (self.predict(x, y) - y).square().mean((1, 2, 3))
        self.adam.zero_grad(set_to_none=True)
        losses.sum().backward()  # no parameter of one seed is in the loss of another
        self._clip()
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        return losses.detach()

    def _clip(self) -> None:
        if self.clip is None:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        squares = sum(g.flatten(1).square().sum(1) for g in gradients)
        factor = (self.clip / (torch.as_tensor(squares).sqrt() + 1e-6)).clamp(max=1.0)
        for g in gradients:
            g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))

    @torch.no_grad()
    def evaluate(self, setting: Setting) -> list[dict[str, Any]]:
        """Errors of every seed on the same new streams."""
        made = torch.Generator(self.device).manual_seed(10_007)
        task, count = setting.task, len(setting.seeds)
        errors, metrics = [], []
        for _ in range(setting.evaluated):
            x, y = task.sample(setting.batch, made).inputs
            predicted = self.predict(*(z.expand(count, *z.shape) for z in (x, y)))
            errors.append((predicted.double() - y.double()).square().mean((1, 3)))
            metrics.append([task.metrics(p, y) for p in predicted])
        by_position = torch.stack(errors).mean(0).tolist()
        return [
            {
                **{key: sum(m[i][key] for m in metrics) / len(metrics) for key in metrics[0][i]},
                "by_position": by_position[i],
            }
            for i in range(count)
        ]


class Experiment:
    """Everything, file by file."""

    def __init__(self, folder: Path, setting: Setting, device: str, minutes: float) -> None:
        self.folder, self.setting, self.device, self.minutes = folder, setting, device, minutes
        folder.mkdir(parents=True, exist_ok=True)

    def everything(self) -> dict[str, Any]:
        """Makes what is missing, and the file of all."""
        plan = self.kept("plan", self.plan)
        trained = {
            name: self.kept(f"trained_{name}", lambda n=name: self.train(n, plan["steps"]))
            for name in MECHANISMS
        }
        untrained = {}
        for mode in ("cluster", "iid"):
            for d in self.setting.untrained_dims:
                found = self.kept(f"untrained_{mode}_{d}", lambda m=mode, d=d: self.untrained(m, d))
                untrained[f"{mode} {d}"] = {  # errors by position stay in the file of their own
                    name: {key: score[key] for key in ("error", "ratio", "settings")}
                    for name, score in found.items()
                }
        result = {
            **facts(self.device),
            "setting": asdict(self.setting),
            "plan": plan,
            "trained": trained,
            "untrained": untrained,
        }
        self.write("regression_gpu", result)
        return result

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the file of that name holds, made first if there is none of this setting."""
        path = self.folder / f"{name}.json"
        setting = json.loads(as_json(asdict(self.setting)))
        if path.exists():
            found = json.loads(path.read_text())
            if found["setting"] != setting:
                raise ValueError(f"{path} was made with another setting: use another folder")
            return found["found"]
        begun = time.perf_counter()
        found = make()
        print(f"{time.perf_counter() - begun:6.1f} s  {name}", file=sys.stderr, flush=True)
        self.write(name, {"setting": setting, "found": found})
        return json.loads(as_json(found))

    def write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.folder / f"{name}.json", (as_json(content) + "\n").encode())

    def plan(self) -> dict[str, Any]:
        """How long a step of each mechanism takes, and how many all can make."""
        seconds = {}
        for name in MECHANISMS:
            model = Together(name, self.setting, self.device)
            for _ in range(3):
                model.step(self.setting, 0.0)
            self.wait()
            begun = time.perf_counter()
            for _ in range(5):
                model.step(self.setting, 0.0)
            self.wait()
            seconds[name] = (time.perf_counter() - begun) / 5
        allowed = 60 * self.minutes * SHARE / sum(seconds.values())
        steps = max(1, min(self.setting.most_steps, int(allowed)))
        return {"steps": steps, "seconds_per_step": seconds, "minutes": self.minutes}

    def train(self, name: str, steps: int) -> dict[str, Any]:
        """All seeds of one mechanism."""
        model, optimiser = Together(name, self.setting, self.device), self.setting.optimiser
        begun = time.perf_counter()
        losses = [model.step(self.setting, optimiser.rate(i, steps)) for i in range(1, steps + 1)]
        curves = torch.stack(losses, 1).tolist()
        seconds = time.perf_counter() - begun
        if not bool(torch.tensor(curves).isfinite().all()):
            raise FloatingPointError(f"the loss of {name} is not finite")
        return {
            "steps": steps,
            "seconds": seconds,
            "losses": curves,
            "evaluation": model.evaluate(self.setting),
            "parameters": sum(p.numel() for p in model.models[0].parameters()),
        }

    def untrained(self, mode: Any, d: int) -> dict[str, Any]:
        """Of tuned predictors."""
        s = self.setting
        found = tuned_scores(d, s.untrained_segment, s.untrained_length, mode, device=self.device)
        return dict(found)

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def table(result: dict[str, Any]) -> str:
    """Errors in short."""
    lines = [f"{result['plan']['steps']} steps each; mean squared error by seed"]
    for name, found in result["trained"].items():
        cells = " ".join(f"{e['error']:.4f}" for e in found["evaluation"])
        ends = " ".join(f"{e['error/end']:.4f}" for e in found["evaluation"])
        lines.append(f"  {name:13} {cells}   at the end {ends}   {found['seconds']:.0f} s")
    lines.append("without training, error (ratio to local linear)")
    for name, found in result["untrained"].items():
        cells = ", ".join(f"{n} {s['error']:.3f} ({s['ratio']:.2f})" for n, s in found.items())
        lines.append(f"  {name:10} {cells}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Makes what is missing in the folder, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0, help="for the training in all")
    parser.add_argument("--impl", default="auto", help="of local linear attention in training")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a processor")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here (--dry-run tries the script without one)")
    setting, device = (TINY, "cpu") if options.dry_run else (Setting(), "cuda")
    setting = replace(setting, impl=options.impl)
    result = Experiment(options.folder, setting, device, options.minutes).everything()
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
