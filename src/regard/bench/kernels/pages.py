"""The results of a kernel benchmark as Markdown tables and pictures, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regard.bench.kernels.result import fuzzed
from regard.bench.report.words import number

Json = Mapping[str, Any]
TITLES = {
    "forward": "Forward",
    "gradients": "Forward and backward",
    "decode": "Decoding: one query per head",
    "relatives": "Softmax and Parallax by the same engine",
    "other keys": "Other keys",
    "lengths": "Lengths",
    "not causal": "Not causal",
    "other dtypes": "Other dtypes",
    "other heads": "Grouped queries",
    "instruction sets": "Lower instruction sets",
    "precision": "Precision",
    "tolerance": "Tolerance",
    "variants": "Other patterns and operands, per visible pair",
    "memory": "Memory",
    "eager": "The eager form",
    "linear family": "The linear family",
    "linear family, gradients": "The linear family, forward and backward",
    "linear family, memory": "The linear family, memory of a forward and backward",
    "linear family, decode": "The linear family, one token",
    "chosen blocks": "Block-sparse attention",
    "chosen blocks, gradients": "Block-sparse attention, forward and backward",
    "chosen blocks, lower sets": "Block-sparse attention, lower instruction sets",
    "windows": "Windows",
    "policies": "Block-sparse attention with the choice of blocks",
}

# Numbers that are shown where some row has a target for them.
EXTRA = (
    "backward/forward", "forward/base", "pair/base", "memory/inputs", "memory of both/q",
    "SDPA/forward", "SDPA/both",
    "flash/forward", "transformers/forward", "forward/fla", "forward/read", "us", "us in grad mode",
    "published/forward", "forward/Flex", "first call",
)  # fmt: skip
# Numbers that are shown wherever a row has them.
ALWAYS = (
    "both/Flex", "Flex compile s", "plan ms", "with plan ms", "with plan/flash",
    "us asking for gradients",
)  # fmt: skip


def yardsticks(result: Json) -> tuple[str, ...]:
    """Torch's kernels that were timed beside ours."""
    return ("flash", "cuDNN") if result["device"].startswith("cuda") else ("SDPA",)


def about(result: Json) -> str:
    """Where, with what and when; how much of it was right; which targets were missed."""
    where, versions = result["machine"], result["versions"]
    name = where.get("gpu") or where.get("processor") or where["architecture"]
    peaks = [value for value in result["fma_peak_gflops"].values() if value]
    lines = [
        f"{name}; " + ", ".join(f"{n} {v}" for n, v in versions.items()) + f"; {result['date']}."
    ]
    if peaks:
        what = (
            "a plain bfloat16 product" if "gpu" in where else "one thread that multiplies and adds"
        )
        words = " and ".join(f"{number(peak)}" for peak in peaks)
        lines.append(f"Peak of {what}, before and after: {words} GFLOP/s.")
    right = sum(row["right"] for row in result["checks"])
    lines.append(f"{right} of {len(result['checks'])} short calls are right, gradients included.")
    lines += [f"{fuzzed(found)}." for found in result["fuzz"]]
    wrong = result["wrong"]
    lines.append(f"Wrong results: {len(wrong)}." if wrong else "No result is wrong.")
    return " ".join(lines) + "\n"


def missed(result: Json) -> str:
    """The targets that were not met, as a list; how many were."""
    rows = [*result["checks"], *result["rows"], *result["threaded"]]
    targets = [(row, t) for row in rows for t in row["targets"] if t["level"] == "must"]
    met = sum(t["met"] for _, t in targets)
    stretched = [t["met"] for row in rows for t in row["targets"] if t["level"] == "stretch"]
    words = f"; of the stretched ones {sum(stretched)} of {len(stretched)}" if stretched else ""
    lines = [f"{met} of {len(targets)} targets are met{words}.\n"]
    for row, target in targets:
        if not target["met"]:
            noisy = ", while the machine was not quiet" if row.get("noisy") else ""
            lines.append(
                f"- {row['name']}: {target['quantity']} {number(target['value'])}, "
                f"wanted {_bound(target)}{noisy}"
            )
    return "\n".join(lines) + "\n"


def table(result: Json, section: str) -> str:
    """The rows of one section."""
    rows = [row for row in result["rows"] if row["section"] == section]
    if not rows:
        left = sorted({r["reason"] for r in result["left_out"] if r["section"] == section})
        return "Not measured" + (f": {'; '.join(left)}" if left else "") + ".\n"
    sticks = yardsticks(result)
    work = (
        "both" if section.endswith(("gradients", "memory")) and section != "memory" else "forward"
    )
    heads = ["call", "ms", *(f"/ {name}" for name in sticks)]
    waited = any(row.get("milliseconds_of_a_call") for row in rows)
    forms = section.startswith("linear family")
    heads[1:1] = ["form"] * forms
    heads += ["of a call, ms"] * waited
    extra = [name for name in EXTRA if any(_wanted(row, name) for row in rows)]
    extra += [name for name in ALWAYS if any(name in row["numbers"] for row in rows)]
    shares = any("of peak" in row["numbers"] for row in rows)
    steps = any(row["iterations"] for row in rows)
    heads += [*extra, "error", *["iterations"] * steps, *["of peak"] * shares]
    heads.append("measured, asked")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        numbers = row["numbers"]
        cells = [row["name"], *[row["form"]] * forms, number(row["milliseconds"].get(work))]
        cells += [_times(numbers.get(f"{work}/{name}")) for name in sticks]
        cells += [number(row.get("milliseconds_of_a_call", {}).get(work))] * waited
        cells += [_number(name, numbers.get(name)) for name in extra]
        cells.append(f"{max(v['error'] or 0.0 for v in row['verdicts']):.0e}")
        if steps:
            cells.append("-" if not row["iterations"] else f"{row['iterations'][0]:.1f}")
        if shares:
            share = numbers.get("of peak")
            cells.append("-" if share is None else f"{100 * share:.0f} %")
        words = [_asked(target) for target in row["targets"]]
        if row["keys"] == "sharp" and row["residual"] is not None:
            words.append(f"residual at most {row['residual']:.0e}")
        if row["noisy"]:
            words.append("the machine was not quiet")
        lines.append("| " + " | ".join([*cells, "; ".join(words)]) + " |")
    return "\n".join(lines) + "\n"


def _asked(target: Json) -> str:
    """A target in words: what, what came out, what was asked, whether it is met."""
    words = f"{target['quantity']} {number(target['value'])}, {_bound(target)}"
    if target["level"] == "stretch":
        return f"{words} (stretch): {'met' if target['met'] else 'not met'}"
    return f"{words}: {'met' if target['met'] else '**missed**'}"


def _title(section: str) -> str:
    return TITLES.get(section, section)


def left_out(result: Json) -> str:
    """What was not measured: how many rows of which section, and why; "" if nothing."""
    found: dict[tuple[str, str], int] = {}
    for row in result["left_out"]:
        if row["section"] != "threads":  # named with the table of those
            key = (_title(row["section"]), row["reason"])
            found[key] = found.get(key, 0) + 1
    if not found:
        return ""
    lines = [f"- {name}: {count}; {why}" for (name, why), count in found.items()]
    return "### Not measured\n\n" + "\n".join(lines) + "\n"


def threads(result: Json) -> str:
    """What a second thread gained."""
    heads = ["call", "one, ms", "two, ms", "gain", "median gain", "rounds", "target"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in result["threaded"]:
        one, two = row["milliseconds"]["one"], row["milliseconds"]["two"]
        asked = [f"{'' if t['met'] else '**missed:** '}{_bound(t)}" for t in row["targets"]]
        gains = [f"{row['gain']:.2f}", f"{row['median_gain']:.2f}"]
        cells = [row["name"], number(one), number(two), *gains, str(row["rounds"])]
        lines.append("| " + " | ".join([*cells, "; ".join(asked)]) + " |")
    left = [row for row in result["left_out"] if row["section"] == "threads"]
    lines += [f"\nNot measured: {row['name']}, {row['reason']}." for row in left]
    return "\n".join(lines) + "\n" if result["threaded"] or left else "Not measured.\n"


def sections(result: Json) -> str:
    """Every section that has rows, with its title."""
    names = dict.fromkeys(row["section"] for row in result["rows"])
    parts = [f"### {_title(name)}\n\n{table(result, name)}" for name in names]
    if result["threaded"] or any(row["section"] == "threads" for row in result["left_out"]):
        parts.append(f"### Two threads\n\n{threads(result)}")
    parts += [text for text in [left_out(result)] if text]
    return "\n".join(parts)


def _wanted(row: Json, quantity: str) -> bool:
    return any(t["quantity"] == quantity for t in row["targets"])


def _number(name: str, value: float | None) -> str:
    """A ratio, or a time in the unit that its name says."""
    return _times(value) if "/" in name else "-" if value is None else number(value)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{number(value)}x"


def _bound(target: Json) -> str:
    if target["most"] is not None:
        return f"≤ {target['most']:g}"
    return f"≥ {target['least']:g}"
