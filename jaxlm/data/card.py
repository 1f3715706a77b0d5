"""The data card of a token store: `STORE/card.html`, what is in it and how it came to be, on one page without links.

Counts, lengths, rules, duplicates and whatever else the manifests say, and documents to look at. `python -m
jaxlm.data.card STORE` writes it anew. Read `write` first; the look is `card.html.jinja`.
"""

from collections.abc import Iterator, Mapping
import itertools
import sys
from typing import Any

from etils import epath
import numpy as np

from jaxlm import charts
from jaxlm.data import store as token_store
from jaxlm.data.store import Split, Store
from jaxlm.data.tokenizers import Tokenizer

EXAMPLES, EXCERPT = 3, 1200  # of each source, and the characters that are shown of one
TOLD = {"format", "licence", "source", "splits", "tokenizer", "vocab"}  # of a manifest, told in another way
BINS = 24


def write(store: Store) -> str:
    """Write the card of a finished store and return its path; one that says the same already is left alone."""
    page = _page(store).encode("utf-8", "replace")
    path = epath.Path(store.path) / "card.html"
    if not path.exists() or path.read_bytes() != page:
        fresh = path.with_name(".card.html.new")
        fresh.write_bytes(page)
        fresh.replace(path)
    return str(path)


def _page(store: Store) -> str:
    tokenizer = store.tokenizer()
    manifests = {name: store.manifest(name) for name in store.sources}
    total = {
        key: sum(m["splits"]["train"][key] for m in manifests.values()) for key in ("documents", "tokens", "bytes")
    }
    held = sum(m["splits"]["validation"]["tokens"] for m in manifests.values())
    return charts.page(
        "card.html.jinja",
        title=", ".join(manifests),
        tiles=[
            (charts.number(total["tokens"]), "training tokens"),
            (charts.number(total["documents"]), "training documents"),
            (f"{charts.number(total['bytes'] / 1e6)} MB", "of UTF-8 text"),
            (charts.number(held), "validation tokens"),
            (f"{store.vocab:,}", "tokens in the vocabulary"),
            (f"{total['bytes'] / max(total['tokens'], 1):.2f}", "bytes a token"),
        ],
        sources=[_source(store, name, i, tokenizer) for i, name in enumerate(manifests)],
        words=lambda name: str(name).replace("_", " "),
        figure=_figure,
    )


def _source(store: Store, name: str, place: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the page says about one source."""
    manifest, split = store.manifest(name), store.split(name, "train")
    lengths = np.diff(split.offsets)
    edges, documents, tokens = histogram(lengths)
    label, size = "tokens a document", (4.4, 2.3)
    alt = f"Tokens a document: from {lengths.min(initial=0):,} to {lengths.max(initial=0):,}"
    return dict(
        name=name,
        spec=manifest.get("source", ""),
        licence=manifest.get("licence"),
        head=["documents", "tokens", "bytes", "bytes a token", "median length", "longest"],
        splits=[(kind, _counts(store.split(name, kind), counts)) for kind, counts in manifest["splits"].items()],
        lengths=charts.histogram(edges, documents, size=size, name=f"lengths{place}", alt=alt, label=label),
        mass=charts.histogram(edges, tokens, size=size, name=f"mass{place}", alt=alt, label=label),
        facts={key: value for key, value in manifest.items() if key not in TOLD and value not in (None, {}, [], "")},
        examples=list(_examples(split, tokenizer)),
    )


def histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges [n + 1] in equal ratios, and how many documents [n] and tokens [n] are between them."""
    edges = np.unique(np.geomspace(1, max(int(lengths.max(initial=1)), 2) + 1, BINS + 1).round())
    return edges, np.histogram(lengths, edges)[0], np.histogram(lengths, edges, weights=lengths)[0]


def _counts(split: Split, counts: Mapping[str, int]) -> list[str]:
    lengths = np.diff(split.offsets)
    middle, longest = (int(np.median(lengths)), int(lengths.max())) if len(lengths) else (0, 0)
    ratio = f"{counts['bytes'] / max(counts['tokens'], 1):.2f}"
    whole = [f"{counts[key]:,}" for key in ("documents", "tokens", "bytes")]
    return [*whole, ratio, f"{middle:,}", f"{longest:,}"]


def _examples(split: Split, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Documents from all over the split, decoded; of long ones the beginning."""
    for i in sorted({(2 * n + 1) * len(split) // (2 * EXAMPLES) for n in range(EXAMPLES)}):
        start, stop = int(split.offsets[i]), int(split.offsets[i + 1])
        text = tokenizer.decode(split.read(start, min(stop, start + EXCERPT)).tolist())
        cut = stop - start > EXCERPT or len(text) > EXCERPT
        yield f"document {i:,}: {stop - start:,} tokens", text[:EXCERPT] + (" …" if cut else "")


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    for path in itertools.islice(sys.argv, 1, None):
        print(write(token_store.open(path)))
