"""An inspection as one HTML page: self-contained, readable offline and on a phone."""

from __future__ import annotations

from html import escape

from regard.bench.inspecting.result import Inspection
from regard.bench.report.page import figure, page, paragraphs, table

METHOD = {
    "sinks": "A sink is a token that gets more than a tenth of what queries give, on average over "
    "the queries that see it (arXiv 2406.15765).",
    "heads": "Entropy is that of a row of weights divided by the logarithm of the visible keys: 0 "
    "looks at one, 1 at all alike. Distance is the mean over queries of where the weight lies, in "
    "tokens or, on images, in patches. Importance is the divergence (in bits) between the class "
    "probabilities with and without the head.",
    "maps": "Rows are queries, columns keys; every map has its own scale. The rollout multiplies "
    "the layers' mean maps, each with half of the residual stream (arXiv 2005.00928).",
    "saliency": "Parts of the input are hidden at random, half of them each time. A part's effect "
    "is how much farther the answer moves in the runs that hide it than in the others (divergence "
    "of probabilities in nats; for a model without them, the cosine distance of its vector). "
    "Embeddings of text and standardised pixels are set to 0, spectrograms to their minimum. The "
    "ceiling is what a perfect map could correlate with, given how the two halves of the runs "
    "agree.",
}


def render(result: Inspection) -> str:
    """The page: what was looked at, what was found, how."""
    picture = f'<figure><img src="{result.thumbnail}" alt="The input" style="max-width:16rem">'
    parts = [
        *paragraphs(result.about),
        f"{picture}<figcaption>What the model sees.</figcaption></figure>"
        if result.thumbnail
        else "",
    ]
    for section in result.sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [f'<p class="lead">{escape(sentence)}</p>' for sentence in section.sentences]
        parts += [figure(picture) for picture in section.pictures]
        parts.append(section.page)
        for title, cells in section.tables:
            parts += [f"<p>{escape(title)}</p>", table(*cells, words=True)]
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    parts += [
        "<h2>How it was done</h2>",
        *paragraphs([METHOD[name] for name in result.what]),
        f"<footer>{escape(versions)}</footer>",
    ]
    return page("Attention of a model, looked into", parts)
