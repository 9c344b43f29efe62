"""What one or two learned numbers per head are worth to a pretrained softmax model.

Run: REGARD_RESOURCES=FOLDER python benchmarks/upgrade.py    (about ten minutes of one core)
`--page` only remakes the tables of docs/adapt.md, `--ridges` does section 2 anew. Needs the extra
`hf`. Losses do not depend on how busy the machine is; the seconds, which are processor time of this
process, do a little.

1. A Llama of characters is trained on Shakespeare, from three seeds. Each model is then upgraded to
   local linear attention, learning ridge and bandwidth of every head and nothing else; the control
   learns a temperature of softmax attention per head: as many steps, the same batches. The loss is
   that of text which neither has seen, the same for both.
2. For the first of these models, the held-out loss by ridge, the same for all heads; and what is
   learned from a start at a ridge of 10, which is not the same function.
3. How far the outputs of that model, MiniLM and the decoder of Whisper tiny.en are from those of
   softmax attention at the start, by ridge.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/upgrade.json"
PAGE = ROOT / "docs/adapt.md"
SEEDS = (0, 1, 2)
LENGTH, ROWS = 128, 16  # characters of an example, examples of a batch
PRETRAINING, STEPS = 1000, 200
BLOCK = 20_000  # characters; every tenth block is held out
SIZES = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}  # fmt: skip
RIDGES = (1e4, 1e5, 1e6, 1e7)
FIXED = (1e6, 1e4, 1e3, 1e2, 1e1, 1e0)  # for all heads alike
NEAR = 10.0  # another start, from which a ridge has less far to go
ARMS = {
    "ridge and bandwidth": ("local_linear", ("ridge", "bandwidth")),
    "temperature (control)": ("softmax", ("temperature",)),
}


def text() -> tuple[Any, Any, int]:
    """Characters as numbers, to train on and held out, and how many there are."""
    import torch

    from regard.testing.resources import shakespeare

    whole = shakespeare()
    known = {character: number for number, character in enumerate(sorted(set(whole)))}
    ids = torch.tensor([known[character] for character in whole])
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    held = torch.arange(len(blocks)) % 10 == 9
    return blocks[~held].flatten(), blocks[held].flatten(), len(known)


def drawing(ids: Any) -> Callable[[Any], dict[str, Any]]:
    """Batches of random places."""
    import torch

    def draw(made: Any) -> dict[str, Any]:
        starts = torch.randint(len(ids) - LENGTH, (ROWS,), generator=made)
        rows = ids[starts[:, None] + torch.arange(LENGTH)]
        return {"input_ids": rows, "labels": rows}

    return draw


def held_out(ids: Any) -> list[dict[str, Any]]:
    """64 batches, evenly spread: 131 072 characters."""
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[:: len(rows) // (64 * ROWS)][: 64 * ROWS]
    return [{"input_ids": x, "labels": x} for x in rows.split(ROWS)]


def pretrained(ids: Any, characters: int, seed: int, steps: int) -> Any:
    """A softmax model of characters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from regard.recipes import Optimiser

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=characters, **SIZES))
    settings = Optimiser(3e-3, weight_decay=0.01, warmup=100, schedule="cosine")
    adam, draw = settings.build(model), drawing(ids)
    made = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        for group in adam.param_groups:
            group["lr"] = settings.rate(step, steps)
        adam.zero_grad()
        loss = model(**draw(made)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        if step % 250 == 0:
            tell(f"seed {seed}: step {step}, loss {float(loss.detach()):.3f}")
    return model.eval()


def learned(save: Callable[[dict[str, Any]], None], short: bool) -> Any:
    """Section 1; gives a pretrained model back."""
    from regard.recipes import Optimiser
    from regard.recipes.upgrade import upgrade

    train, held, characters = text()
    validation = held_out(held)[: 2 if short else None]
    found: list[dict[str, Any]] = []
    for seed in SEEDS[: 1 if short else None]:
        model = pretrained(train, characters, seed, 50 if short else PRETRAINING)
        row: dict[str, Any] = {"seed": seed, "arms": {}}
        for name, (mechanism, learn) in ARMS.items():
            start = time.process_time()
            done = upgrade(
                copy.deepcopy(model), drawing(train), steps=3 if short else STEPS,
                mechanism=mechanism, learn=learn, validation=validation, seed=seed,
                optimiser=Optimiser(0.15, schedule="cosine"),
            )  # fmt: skip
            seconds = time.process_time() - start
            row["arms"][name] = {
                "start": done.start, "end": done.end, "ridge": done.ridge, "heads": done.heads,
                "seconds": seconds,
            }  # fmt: skip
            tell(f"seed {seed}, {name}: {done.start:.4f} -> {done.end:.4f} ({seconds:.0f} s)")
        if seed == SEEDS[0]:
            row |= nearer(model, train, validation, short)
        found.append(row)
        save({"characters": characters, "held_out": len(validation), "runs": found})
    return model, validation[0]


def nearer(model: Any, train: Any, validation: Any, short: bool) -> dict[str, Any]:
    """Section 2."""
    from regard.adapt.transformers import swapped
    from regard.recipes import Optimiser
    from regard.recipes.upgrade import mean_loss, upgrade

    fixed = {}
    for ridge in FIXED:
        with swapped(model, "local_linear", ridge=ridge):
            fixed[f"{ridge:.0e}"] = mean_loss(model, validation)
        tell(f"ridge {ridge:.0e}: {fixed[f'{ridge:.0e}']:.4f}")
    done = upgrade(
        copy.deepcopy(model), drawing(train), steps=3 if short else STEPS, ridge=NEAR,
        validation=validation, seed=SEEDS[0], optimiser=Optimiser(0.15, schedule="cosine"),
    )  # fmt: skip
    tell(f"from a ridge of {NEAR:g}: {done.start:.4f} -> {done.end:.4f}")
    near = {"start": done.start, "end": done.end, "heads": done.heads}
    return {"fixed": fixed, "near": near}


def started(model: Any, batch: Any) -> list[dict[str, Any]]:
    """Section 3: the model, where its outputs are, and how far they move by ridge."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    from regard.testing import resources

    minilm, tokens = resources.minilm()
    sentences = [utterance.text for utterance in resources.librivox()]
    words = tokens(sentences, padding=True, return_tensors="pt")
    whisper, features, speech = resources.whisper_tiny()
    spoken = features([utterance.samples for utterance in resources.librivox()])
    with torch.no_grad():
        heard = whisper.model.encoder(spoken).last_hidden_state
    said = speech(sentences, padding=True, return_tensors="pt")
    real = said.attention_mask.bool()

    def whispered() -> Any:
        given = {"decoder_input_ids": said.input_ids, "decoder_attention_mask": said.attention_mask}
        return whisper(encoder_outputs=BaseModelOutput(heard), **given).logits[real]

    cases = (
        ("characters of Shakespeare", model, "logits", None, lambda: model(**batch).logits),
        ("MiniLM", minilm, "hidden states", None,
         lambda: minilm(**words).last_hidden_state[words["attention_mask"].bool()]),
        ("Whisper tiny.en, decoder", whisper, "logits", "*decoder*", whispered),
    )  # fmt: skip
    return [moved(*case) for case in cases]


def moved(
    name: str, model: Any, what: str, layers: str | None, call: Callable[[], Any]
) -> dict[str, Any]:
    """The largest difference from the model's own outputs, by ridge."""
    import torch

    from regard.adapt.transformers import swapped

    with torch.no_grad():
        before, found = call(), {}
        for ridge in RIDGES:
            with swapped(model, "local_linear", layers, ridge=ridge):
                found[f"{ridge:.0e}"] = float((call() - before).abs().max())
    tell(f"{name}: {found}")
    return {"model": name, "what": what, "largest": float(before.abs().max()), "moved": found}


def tell(line: str) -> None:
    print(line, flush=True)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, by the name between their marks."""
    runs = results["learned"]["runs"]
    lines = [
        "| learned per head | held-out loss before, seeds 0, 1, 2 | after | change | "
        "seconds for all steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ARMS:
        arms = [run["arms"][name] for run in runs]
        before = ", ".join(f"{arm['start']:.4f}" for arm in arms)
        after = ", ".join(f"{arm['end']:.4f}" for arm in arms)
        change = ", ".join(f"{arm['end'] - arm['start']:+.5f}" for arm in arms)
        seconds = statistics.fmean(arm["seconds"] for arm in arms)
        lines.append(f"| {name} | {before} | {after} | {change} | {seconds:.0f} |")
    first = runs[0]
    fixed = [
        "| ridge | " + " | ".join(first["fixed"]) + " |",
        "| --- " * (len(FIXED) + 1) + "|",
        "| held-out loss | " + " | ".join(f"{x:.4f}" for x in first["fixed"].values()) + " |",
    ]
    start = [
        "| model | outputs | " + " | ".join(f"ridge {ridge:.0e}" for ridge in RIDGES) + " |",
        "| --- " * (len(RIDGES) + 2) + "|",
    ]
    for row in results["start"]:
        cells = " | ".join(f"{value:.1e}" for value in row["moved"].values())
        start.append(f"| {row['model']} | {row['what']}, up to {row['largest']:.3g} | {cells} |")
    found = {"upgrade": lines, "fixed": fixed, "start": start}
    return {name: "\n".join(rows) for name, rows in found.items()}


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with these tables between their marks."""
    for name, table in tables.items():
        first, last = f"<!-- {name} -->\n", "<!-- end -->"
        before, mark, after = page.partition(first)
        if not mark or last not in after:
            raise ValueError(f"the page has no place for {name!r}")
        page = before + first + table + "\n" + after[after.index(last) :]
    return page


def main(arguments: list[str]) -> None:
    if "--ridges" in arguments:
        results = json.loads(RESULTS.read_text())
        train, held, characters = text()
        model = pretrained(train, characters, SEEDS[0], PRETRAINING)
        results["learned"]["runs"][0] |= nearer(model, train, held_out(held), False)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    elif "--page" not in arguments:
        import torch
        import transformers

        short = "--short" in arguments
        place = Path("/dev/null") if short else RESULTS
        torch.set_num_threads(1)
        results: dict[str, Any] = {
            "machine": f"{platform.machine()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, one thread",
            "pretraining": PRETRAINING, "steps": STEPS, "length": LENGTH, "rows": ROWS,
        }  # fmt: skip

        def save(found: dict[str, Any]) -> None:
            results["learned"] = found
            place.write_text(json.dumps(results, indent=1) + "\n")

        results["start"] = started(*learned(save, short))
        save(results["learned"])
        if short:
            return
    PAGE.write_text(fill(PAGE.read_text(), tables(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main(sys.argv[1:])
