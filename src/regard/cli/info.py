"""`regard info`: what this machine and this installation can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from typing import Annotated, Any

import torch
import typer

import regard
from regard.cli.forms import forms_on
from regard.cli.output import print_heading, print_json, print_table

MASKS = ("causal", "noncausal")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, devices, instruction sets, and which form of each mechanism can run."""
    known = {
        "versions": versions(),
        "extras": extras(),
        "devices": devices(),
        "threads": {"torch": torch.get_num_threads(), "processors": os.cpu_count()},
        "native": native(),
        "mechanisms": mechanisms(),
    }
    if as_json:
        print_json(known)
        return
    rows = [(name, version) for name, version in known["versions"].items()]
    threads = known["threads"]
    rows.append(("threads", f"{threads['torch']} of {threads['processors']} processors"))
    rows += [("device", f"{d['name']}: {d['description']}") for d in known["devices"]]
    rows += _native_rows(known["native"])
    for extra, packages in known["extras"].items():
        found = ", ".join(f"{name} {version or '(missing)'}" for name, version in packages.items())
        rows.append((f"extra {extra}", found))
    print_heading("Installation")
    print_table(("what", "is"), rows)
    print_heading("\nForms, the fastest first")
    print_table(("mechanism", "device", "form", *MASKS), _form_rows(known["mechanisms"]))


def versions() -> dict[str, str]:
    """regard, Python, torch and the system."""
    return {
        "regard": regard.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def extras() -> dict[str, dict[str, str | None]]:
    """Extra -> package -> installed version or None, as the metadata of regard declares them."""
    found: dict[str, dict[str, str | None]] = {}
    try:
        requirements = importlib.metadata.requires("regard") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree on sys.path, not installed
        return found
    for requirement in requirements:
        package = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*[\"'](\w+)[\"']", requirement)
        if package and extra and package[0] != "regard" and extra[1] not in ("dev", "docs"):
            found.setdefault(extra[1], {})[package[0]] = _version_of(package[0])
    return found


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, str]]:
    """The CPU, and every accelerator that this torch can use."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = [{"name": "cpu", "description": f"{platform.machine()}, torch uses {capability}"}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            description = (
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB"
            )
            found.append({"name": f"cuda:{index}", "description": description})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "description": "Apple GPU"})
    return found


def native() -> dict[str, Any]:
    """The native library: what it was built for, what of it runs here, or why it is missing."""
    status = regard.native.status()
    return {
        "loaded": status.loaded,
        "built": list(status.built),
        "usable": list(status.instruction_sets),
        "reason": status.reason,
        "remedy": status.remedy,
    }


def mechanisms() -> dict[str, dict[str, dict[str, Any]]]:
    """Mechanism -> device -> mask -> the form that runs, and why each other cannot (None: it can).

    >>> mechanisms()["softmax"]["cpu"]["causal"]["forms"]["reference"] is None
    True
    """
    return {
        name: {
            device["name"]: {
                mask: {"runs": forms.runs, "forms": forms.reasons, "problem": forms.problem}
                for mask, forms in forms_on(card, device["name"]).items()
            }
            for device in devices()
        }
        for name, card in regard.mechanisms.items()
    }


def _native_rows(library: dict[str, Any]) -> list[tuple[str, str]]:
    if not library["loaded"]:
        return [
            ("native library", f"none: {library['reason']}"),
            ("", f"to have it: {library['remedy']}"),
        ]
    built, usable = ", ".join(library["built"]), ", ".join(library["usable"])
    return [
        ("native library", f"built for {built}"),
        ("instruction sets", f"{usable} run here; {library['usable'][0]} is used"),
    ]


def _form_rows(known: dict[str, dict[str, dict[str, Any]]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, on in known.items():
        for device, masks in on.items():
            forms = dict.fromkeys(form for answer in masks.values() for form in answer["forms"])
            for form in forms:
                can = [_can(masks.get(mask), form) for mask in MASKS]
                rows.append((name, device, form, *can))
            for mask, answer in masks.items():
                if answer["problem"]:
                    rows.append((name, device, "none", f"{mask}: {answer['problem']}", ""))
    return rows


def _can(answer: dict[str, Any] | None, form: str) -> str:
    if answer is None or form not in answer["forms"]:
        return "-"
    reason = answer["forms"][form]
    if reason is not None:
        return f"no: {reason}"
    return "yes, chosen" if answer["runs"] == form else "yes"
