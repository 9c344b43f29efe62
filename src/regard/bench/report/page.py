"""The parts of an HTML page that is self-contained and readable offline and on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from regard.bench.report.plotting import Picture


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page around its parts; empty ones leave no trace."""
    template = files("regard.bench.report") / "templates" / "page.html"
    body = "\n".join(filter(None, parts))
    return Template(template.read_text(encoding="utf-8")).substitute(title=escape(title), body=body)


def paragraphs(lines: Sequence[str]) -> list[str]:
    """Each line in its own."""
    return [f"<p>{escape(line)}</p>" for line in lines]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """A table that scrolls where the screen is narrow; ` <` at the end of a cell marks the best."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    kind = ' class="words"' if words else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    if text.endswith(" <"):
        return f'<td class="best">{escape(text[:-2])}</td>'
    return f"<td>{escape(text)}</td>"


def figure(picture: Picture | None) -> str:
    """A picture with its caption; nothing for None."""
    if picture is None:
        return ""
    return (
        f'<figure><img src="{picture.source}" alt="{escape(picture.alt)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )
