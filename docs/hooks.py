"""Fills the documentation from the cards, so that a page cannot say what the code does not.

`{{ mechanisms }}`, `{{ laws }}`, `{{ exceptions }}` and `{{ budgets }}` become tables;
`{{ card NAME }}` is what one card says, `{{ errors SERIES }}` the errors measured on a series,
`{{ speed DEVICE }}` the times measured on a device, `{{ kernels DEVICE }}` those of the compiled
forms, `{{ trained }}` what models learnt on a GPU, `{{ parallel }}` times on several devices,
`{{ which linear }}` a comparison, `{{ tap }}` and `{{ act … }}` what taps and edits cost,
`{{ real speech }}` and `{{ real sentences }}` what was read in real models, `{{ vit NAME }}` in a
vision model,
`{{ copy alignment }}` in a small one of known alignment,
`{{ file README.md }}` a file of the repository. A mechanism without a hand-written page gets one
made from its card.
"""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from pathlib import Path
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import regard
from regard.testing import tables

DOCS = Path(__file__).parent


def _beside(name: str) -> ModuleType:
    """A script of this folder as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_readme, _performance, _measured, _real_models, _tap_costs, _vit_heads = map(
    _beside, ("readme", "performance", "measured", "real_models", "tap_costs", "vit_heads")
)

TABLES = {
    "mechanisms": lambda: tables.table(link="{name}.md"),
    "laws": tables.law_table,
    "exceptions": lambda: tables.exceptions() or "None: every card is held to every law.\n",
    "budgets": tables.budget_table,
    "tap": _tap_costs.table,
    **{name: partial(_tap_costs.act, name) for name in _tap_costs.ACT},
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every mechanism that has none, and pictures of what was measured."""
    for place, picture in _performance.pictures().items():
        files.append(File.generated(config, place, content=picture))
    for name in regard.mechanisms:
        place = f"mechanisms/{name}.md"
        if not (DOCS / place).exists():
            content = f"# {name}\n\n{{{{ card {name} }}}}\n"
            files.append(File.generated(config, place, content=content))
    return files


def _of_the_repository(name: str) -> str:
    """README or CONTRIBUTING as a page: links into docs/ are shortened, others become text."""
    text = (DOCS.parent / name).read_text()
    text = text.replace("](CONTRIBUTING.md)", "](contributing.md)")
    text = re.sub(r"\]\(docs/(?!toy_mechanism)", "](", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:docs/toy_mechanism|src|CHANGELOG)[^)]*\)", r"\1", text)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces the placeholders."""
    markdown = re.sub(
        r"\{\{ file ([\w.]+) \}\}", lambda match: _of_the_repository(match.group(1)), markdown
    )
    for name, make in TABLES.items():
        placeholder = f"{{{{ {name} }}}}"
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, make())
    markdown = re.sub(
        r"\{\{ errors ([\w-]+) \}\}", lambda match: _readme.error_table(match.group(1)), markdown
    )
    markdown = re.sub(
        r"\{\{ speed (\w+) \}\}", lambda match: _readme.speed_table(match.group(1)), markdown
    )
    markdown = _vit_heads.filled(markdown)
    markdown = _real_models.filled(_measured.filled(_performance.filled(markdown)))
    return re.sub(r"\{\{ card (\w+) \}\}", lambda match: _card(match.group(1)), markdown)


def _card(name: str) -> str:
    """What the card says, and the docstring of its op."""
    card = regard.mechanisms[name]
    return f"{tables.card_page(card)}\n\n::: {card.op.__module__}.{card.op.__name__}\n"
