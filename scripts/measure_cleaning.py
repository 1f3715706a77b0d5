"""Measure deduplication against brute force, and boilerplate removal against reference texts.

    python -m scripts.measure_cleaning dedup                      planted near-duplicates at every similarity
    python -m scripts.measure_cleaning html PAGES.jsonl.gz        pages with `html` and reference `text`
    python -m scripts.measure_cleaning speed PAGES.jsonl.gz       MB/s of each rule on one core

What was seen is in experiments/cleaning/README.md.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
import gzip
from html.parser import HTMLParser
import itertools
import json
import random
import re
import sys
import time

import numpy as np

from jaxlm import lookup
from jaxlm.data.cleaning import Cleaner
from jaxlm.data.dedup import NEAR, Dedup, Records, dedup, verdicts

LEVELS = [0.0, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]


def generate(seed: int, originals: int = 1500, copies: int = 2) -> list[str]:
    """Texts of 50 to 400 words drawn by Zipf's law, a third of them under a common heading, and edited copies of each:
    words replaced, a passage left out or moved, sentences added; in random order.
    """
    rng = random.Random(seed)
    words = [f"{'' if i < 100 else 'w'}{i}" for i in range(20_000)]
    weights = np.cumsum(1 / np.arange(1, len(words) + 1)).tolist()
    draw = lambda count: rng.choices(words, cum_weights=weights, k=count)  # noqa: E731
    heading = draw(30)
    texts = [heading * (i % 3 == 0) + draw(rng.randint(50, 400)) for i in range(originals)]
    for original in list(texts):
        for _ in range(copies):
            copy, share = list(original), rng.uniform(0, 0.5)
            kind, size = rng.randrange(4), int(share * len(copy) / 2)
            at, to = rng.randrange(len(copy) - size), rng.randrange(len(copy) - size)
            if kind == 0:  # each replaced word spoils up to five shingles
                for place in rng.sample(range(len(copy)), int(share * len(copy) / 8)):
                    copy[place] = draw(1)[0]
            elif kind == 1:
                del copy[at : at + size]
            elif kind == 2:
                passage = copy[at : at + size]
                del copy[at : at + size]
                copy[to:to] = passage
            else:
                copy[at:at] = draw(size)
            texts.append(copy)
    rng.shuffle(texts)
    return [" ".join(text) for text in texts]


def similar(d: Dedup, texts: list[str]) -> dict[tuple[int, int], float]:
    """The exact Jaccard similarity of every pair of texts that share a shingle; that of all others is 0."""
    holders, sizes, shared = defaultdict(list), [], Counter()
    for i, text in enumerate(texts):
        found = d.shingles(text).tolist()
        sizes.append(len(found))
        for shingle in found:
            holders[shingle].append(i)
    for group in holders.values():
        shared.update(itertools.combinations(group, 2))
    return {(i, j): n / (sizes[i] + sizes[j] - n) for (i, j), n in shared.items()}


def measure_dedup() -> None:
    """Pairs found by bands and estimate against all pairs at the threshold or above; then documents left out."""
    texts = generate(0)
    print(f"{len(texts):,} texts, {sum(map(len, texts)) / 1e6:.1f} MB")
    truth = similar(dedup(), texts)
    for near, permutations in [(0.8, 64), (0.8, 128), (0.8, 256), (0.7, 256), (0.9, 256)]:
        d = dedup(exact=False, near=near, permutations=permutations)
        begun = time.perf_counter()
        signatures = np.stack([d.signature(text) for text in texts])
        signed = time.perf_counter() - begun
        records = Records(
            np.zeros(len(texts), bool),
            np.zeros(len(texts), np.uint64),
            lambda band, d=d, signatures=signatures: d.band(signatures, band),
            lambda which, signatures=signatures: signatures[which],
        )
        begun = time.perf_counter()
        gone = set(np.flatnonzero(verdicts(d, records) == NEAR).tolist())
        decided = time.perf_counter() - begun
        candidates = groups_of(d, signatures)
        found = {pair for pair in candidates if d.alike(signatures[pair[0]], signatures[pair[1]])}
        wanted = {pair for pair, similarity in truth.items() if similarity >= near}
        right = found & wanted
        close = sum(truth.get(pair, 0) >= near - 0.05 for pair in found)
        sure = [pair for pair, similarity in truth.items() if similarity >= near + 0.05]
        print(
            f"\nnear={near} permutations={permutations}: {d.bands} bands of {d.rows}; "
            f"{signed / len(texts) * 1e6:.0f} us a signature, {decided:.2f} s for verdicts; "
            f"{len(candidates):,} candidates\n"
            f"  pairs: precision {len(right) / len(found):.4f} "
            f"({close / len(found):.4f} at {near - 0.05:.2f} or above), "
            f"recall {len(right) / len(wanted):.4f} "
            f"({sum(p in found for p in sure) / len(sure):.4f} at {near + 0.05:.2f} or above)"
        )
        exact = brute_force(truth, near, len(texts))
        print(
            f"  documents: {len(gone):,} left out, {len(exact):,} by brute force; "
            f"precision {len(gone & exact) / len(gone):.4f}, recall {len(gone & exact) / len(exact):.4f}"
        )
        for low, high in itertools.pairwise(LEVELS):
            pairs = [p for p, s in truth.items() if low <= s < high or s == high == 1.0]
            hit, seen = sum(p in found for p in pairs), sum(p in candidates for p in pairs)
            share = hit / max(1, len(pairs))
            print(f"  {low:.2f} to {high:.2f}: {len(pairs):7,} pairs, candidates {seen:6,}, found {share:.4f}")


def groups_of(d: Dedup, signatures: np.ndarray) -> set[tuple[int, int]]:
    """Every pair of documents that share a band."""
    groups = defaultdict(list)
    for i, signature in enumerate(signatures):
        for key in d.keys(signature):
            groups[key].append(i)
    return {pair for group in groups.values() for pair in itertools.combinations(group, 2)}


def brute_force(truth: dict[tuple[int, int], float], near: float, count: int) -> set[int]:
    """The documents that go when every similarity is known: each that is like an earlier one that stays."""
    earlier, gone = defaultdict(list), set()
    for (i, j), similarity in truth.items():
        if similarity >= near:
            earlier[j].append(i)
    for document in range(count):
        if any(other not in gone for other in earlier[document]):
            gone.add(document)
    return gone


class _Stripper(HTMLParser):
    """The baseline: all text between tags, but scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.texts, self._hidden = [], 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style", "noscript")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "noscript") and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.texts.append(data)


def strip_tags(html: str) -> str:
    """All text between the tags of a page."""
    stripper = _Stripper()
    stripper.feed(html)
    return " ".join(stripper.texts)


def agreement(found: str, reference: str) -> tuple[float, float, float]:
    """(precision, recall, F1) of the words of two texts, each as often as it occurs."""
    one, other = (Counter(re.findall(r"\w+", text.lower())) for text in (found, reference))
    shared = (one & other).total()
    precision, recall = shared / max(1, one.total()), shared / max(1, other.total())
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


def pages(path: str) -> list[dict[str, str]]:
    """The rows of a file of JSON lines."""
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def measure_html(path: str) -> None:
    """Token precision, recall and F1, each the mean over pages, for the rule's settings and for baselines."""
    import trafilatura

    def by_rule(**options: object) -> Callable[[str], str]:
        cleaner = Cleaner.of([dict(name="html", **options)])
        return lambda html: cleaner(html).text or ""

    ways: dict[str, Callable[[str], str]] = {
        "tags stripped": strip_tags,
        "trafilatura.html2txt": trafilatura.html2txt,
        "trafilatura.baseline": lambda html: trafilatura.baseline(html)[1],
        "rule": by_rule(),
        "rule, favour=precision": by_rule(favour="precision"),
        "rule, favour=recall": by_rule(favour="recall"),
        "rule, fast=False": by_rule(fast=False),
        "rule, fast=False, precision": by_rule(fast=False, favour="precision"),
        "rule, tables=False": by_rule(tables=False),
        "rule, comments": by_rule(comments=True),
    }
    rows = pages(path)
    for name, extract in ways.items():
        begun = time.perf_counter()
        texts = [extract(row["html"]) for row in rows]
        seconds = time.perf_counter() - begun
        scores = np.array([agreement(text, row["text"]) for text, row in zip(texts, rows)])
        precision, recall, f1 = scores.mean(0)
        print(
            f"{name:30} precision {precision:.3f} recall {recall:.3f} F1 {f1:.3f} "
            f"(median {np.median(scores[:, 2]):.3f}, lowest tenth {np.quantile(scores[:, 2], 0.1):.3f}), "
            f"{sum(not text for text in texts)} empty, {seconds / len(rows) * 1e3:.0f} ms a page",
            flush=True,
        )


def measure_speed(path: str) -> None:
    """How fast each rule is on one core: `html` on pages, the others on their reference texts."""
    rows = pages(path)
    for name in lookup.names("jaxlm.data.cleaning"):
        cleaner = Cleaner.of([dict(name=name, **(dict(keep=["en"]) if name == "language" else {}))])
        texts = [row["html" if name == "html" else "text"] for row in rows]
        cleaner(texts[0])
        begun = time.perf_counter()
        did = Counter(cleaner(text).steps[0].did for text in texts)
        seconds = time.perf_counter() - begun
        print(f"{name:12} {sum(map(len, texts)) / seconds / 1e6:7.2f} MB/s   {dict(did)}")
    d, texts = dedup(), [row["text"] for row in rows]
    begun = time.perf_counter()
    for text in texts:
        d.digest(text)
        d.signature(text)
    print(f"{'dedup':12} {sum(map(len, texts)) / (time.perf_counter() - begun) / 1e6:7.2f} MB/s")


if __name__ == "__main__":
    what, *arguments = sys.argv[1:] or ["dedup"]
    lookup.key("measure_cleaning", what, dict(dedup=measure_dedup, html=measure_html, speed=measure_speed))(*arguments)
