"""Which documents are duplicates of which: exact ones by a digest, near ones by MinHash signatures.

    d = dedup(near=0.8)
    d.digest(text)                   int, 64 bits; equal for texts that differ in case or white space alone
    d.signature(text)                uint32[permutations]; the share of equal entries estimates the Jaccard similarity
                                     of two texts' sets of word 5-grams (rensa's R-MinHash, arXiv:1704.04370)
    verdicts(d, records)             uint8[N]: KEPT, DROPPED (before), EXACT, NEAR

Documents come in a fixed order and the first one wins: one goes when it is like an earlier one that stays. So no two
that stay are known to be alike, whichever split they belong to. Candidates are found by locality-sensitive hashing:
documents that agree in one of the `bands` of `rows` entries each. They are verified by the estimate from all entries
(standard error 0.025 at a similarity of 0.8 and 256 permutations), not by the sets themselves.

`verdicts` decides on one machine. Many come to the same: group by `Dedup.digest` and keep the first of each; group the
rest by each of `Dedup.keys`; within a group, find the pairs that are `Dedup.alike`; of all pairs, the `losers` go.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import hashlib
from typing import Any, NamedTuple
import unicodedata

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

from jaxlm.data import shingles
from jaxlm.lookup import Mistake, known

KEPT, DROPPED, EXACT, NEAR = range(4)  # DROPPED: by a rule, before it came to duplicates
RECALL = 0.99  # the least chance that a pair right at the threshold becomes a candidate


def dedup(
    *,
    exact: bool = True,
    near: float | None = 0.8,
    ngram: int = 5,
    permutations: int = 256,
    prefer: Sequence[str] = (),
) -> "Dedup":
    """From `config.prepare.dedup`: `near` is the least similarity of duplicates, None or 0 for exact ones alone.

    Documents of the sources that `prefer` names win, in this order, over those of the others, which follow by name.
    Raises `Mistake` for values that make no sense.
    """
    where = "config.prepare.dedup"
    if near and not 0 < near <= 1:
        raise Mistake(f"{where}.near is a similarity above 0 and up to 1, or None, not {near}")
    if ngram < 1 or permutations < 16:
        raise Mistake(f"{where}: ngram={ngram} and permutations={permutations} must be 1 and 16 at least")
    if not exact and not near:
        raise Mistake(f"{where} asks for neither exact nor near duplicates; leave it out")
    return Dedup(exact, near or None, ngram, permutations, tuple(prefer))


@dataclasses.dataclass(frozen=True)
class Dedup:
    """What counts as a duplicate; all its methods are pure."""

    exact: bool
    near: float | None
    ngram: int
    permutations: int
    prefer: tuple[str, ...] = ()

    def order(self, sources: Iterable[str]) -> list[str]:
        """The names of sources, those first whose documents win; raises `Mistake` for a preferred one that is none."""
        sources = set(sources)
        known("config.prepare.dedup.prefer", self.prefer, sources)
        return [*self.prefer, *sorted(sources - set(self.prefer))]

    @property
    def rows(self) -> int:
        """Entries of a band: as many as leave a pair at the threshold a chance of RECALL to agree in one band."""
        chance = lambda rows: 1 - (1 - (self.near or 1) ** rows) ** (self.permutations // rows)  # noqa: E731
        return max((r for r in range(1, self.permutations + 1) if chance(r) >= RECALL), default=1)

    @property
    def bands(self) -> int:
        """How many bands a signature has; entries that fill no band serve for verification alone."""
        return self.permutations // self.rows if self.near else 0

    def digest(self, text: str) -> int:
        """A number for a text, whose case and white space do not matter."""
        plain = " ".join(unicodedata.normalize("NFC", text).casefold().split())
        return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest())

    def shingles(self, text: str) -> np.ndarray:
        """The set of hashed word n-grams; a text of fewer words is one shingle: uint64[count], sorted."""
        found = shingles.hashes(text, self.ngram)
        return np.unique(found) if len(found) else np.array([self.digest(text)], np.uint64)

    def signature(self, text: str) -> np.ndarray:
        """The MinHash signature of a text's shingles: uint32[permutations]."""
        found = self.shingles(text)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(found, [0, len(found)], self.permutations, 0)
        return np.array(matrix.to_rows()[0], np.uint32)

    def keys(self, signature: np.ndarray) -> list[bytes]:
        """What a document is filed under, one key a band: those that share one are candidates."""
        return [b"%d:" % band + self.band(signature, band).tobytes() for band in range(self.bands)]

    def band(self, signature: np.ndarray, band: int) -> np.ndarray:
        """The entries of one band, of one signature or of many: uint32[..., rows]."""
        return np.ascontiguousarray(signature[..., band * self.rows : (band + 1) * self.rows])

    def alike(self, one: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether a signature, uint32[permutations], is a near-duplicate of others: bool[...]."""
        return (one == others).mean(axis=-1) >= (self.near or 2)


class Records(NamedTuple):
    """What is known of N documents, in their order. `band` and `signatures` may read from disk: `verdicts` asks for
    each band once, and for the signatures of candidates alone.
    """

    dropped: np.ndarray  # bool[N]: by a rule
    digests: np.ndarray  # uint64[N]
    band: Callable[[int], np.ndarray]  # which -> uint32[N, rows]
    signatures: Callable[[np.ndarray], np.ndarray]  # int64[n], sorted -> uint32[n, permutations]


def verdicts(dedup: Dedup, records: Records) -> np.ndarray:
    """What becomes of each document: uint8[N] of KEPT, DROPPED, EXACT, NEAR.

    Holds about 50 bytes a document, and of each document that shares a band with another its signature (4 bytes a
    permutation) and some 100 bytes for each such band. Time grows with the pairs that share a band and both stay.
    """
    verdict = np.where(records.dropped, DROPPED, KEPT).astype(np.uint8)
    here = np.flatnonzero(verdict == KEPT)
    _, first = np.unique(records.digests[here], return_index=True)
    if dedup.exact:
        verdict[np.delete(here, first)] = EXACT
        here = here[np.sort(first)]
    if not dedup.near:
        return verdict

    found = [_shared(records.band(band)[here]) for band in range(dedup.bands)]
    member, group = (
        np.concatenate([m for m, _ in found]),
        np.concatenate([2**32 * b + g for b, (_, g) in enumerate(found)]),
    )
    order = np.argsort(member, kind="stable")
    candidates, starts = np.unique(member[order], return_index=True)
    group, signatures = group[order], records.signatures(here[candidates])
    kept: dict[int, list[int]] = defaultdict(list)  # group -> its documents that stay
    for i, (start, stop) in enumerate(zip(starts, np.append(starts[1:], len(group)))):
        mine = group[start:stop].tolist()
        earlier = sorted({other for g in mine for other in kept.get(g, ())})
        if earlier and dedup.alike(signatures[i], signatures[earlier]).any():
            verdict[here[candidates[i]]] = NEAR
        else:
            for g in mine:
                kept[g].append(i)
    return verdict


def _shared(band_NR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents that agree in a band with another: which (int64), and a number of the group of each."""
    odd = np.random.default_rng(0).integers(2**63, size=band_NR.shape[1], dtype=np.uint64) * 2 + 1
    keys = (band_NR * odd).sum(axis=1, dtype=np.uint64)  # two bands that agree by chance make one candidate more
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    member = np.flatnonzero(sizes[group] > 1)
    return member, group[member].astype(np.int64)


def losers(pairs: Iterable[tuple[Any, Any]]) -> set[Any]:
    """Of pairs of near-duplicates, (earlier, later) by any keys that sort, the documents that go."""
    earlier = defaultdict(list)
    for one, other in pairs:
        earlier[max(one, other)].append(min(one, other))
    gone: set[Any] = set()
    for document in sorted(earlier):
        if any(other not in gone for other in earlier[document]):
            gone.add(document)
    return gone
