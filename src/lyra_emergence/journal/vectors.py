"""Nearest passages by vector: a bit for each dimension of all, then the whole vectors of the nearest by bits.

The signs of a vector's components are a code of a bit each: 48 bytes for MiniLM's 384 dimensions, 4.8 MB for 100,000
passages, which stay in memory. Codes are compared by the bits that differ, and of the `_SHORTLIST` nearest the vectors
themselves are read from the file and compared (Charikar, "Similarity Estimation Techniques from Rounding Algorithms",
STOC 2002, is why the first step is good enough to choose by). Up to `_SHORTLIST` passages nothing is approximate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from lyra_emergence.journal.filters import ALL

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from lyra_emergence.journal.filters import Those
    from lyra_emergence.journal.store import Store

__all__ = ["VectorSearch", "pack"]

_SHORTLIST: Final = 1024
_WORD: Final = 8  # bytes of the integers that codes are compared in


def pack(vectors: NDArray[np.float32]) -> Iterable[tuple[bytes, bytes]]:
    """Yield for each row of `vectors`, (texts, dimension), its code and itself as 16-bit floats."""
    bits = np.packbits(vectors > 0, axis=1)
    padded = np.zeros((len(bits), -(-bits.shape[1] // _WORD) * _WORD), np.uint8)
    padded[:, : bits.shape[1]] = bits
    for code, vector in zip(padded, vectors.astype("<f2"), strict=True):
        yield code.tobytes(), vector.tobytes()


class VectorSearch:
    """The codes of a store in memory, kept up with it.

    Args:
        store: Holds codes and vectors.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._forget()

    def _forget(self) -> None:
        self._last = 0
        self._passages = np.zeros(0, np.int64)
        self._days = np.zeros(0, np.int64)
        self._codes = np.zeros((0, 0), np.uint64)

    @property
    def count(self) -> int:
        """How many passages have a vector."""
        self._catch_up()
        return len(self._passages)

    def nearest(self, asked: NDArray[np.float32], limit: int, those: Those = ALL) -> list[tuple[int, float]]:
        """Return the passages nearest to the unit vector `asked`, (dimension,), with their cosines, best first.

        Args:
            asked: What to be near to.
            limit: The most to return.
            those: The passages to look at.
        """
        self._catch_up()
        rows = self._allowed(those)
        if not len(rows) or self._codes.shape[1] * _WORD * 8 < len(asked):
            return []
        if len(rows) > _SHORTLIST:
            (code, _), *_ = pack(asked[None])
            codes = self._codes if len(rows) == len(self._codes) else self._codes[rows]
            differing = np.bitwise_count(codes ^ np.frombuffer(code, np.uint64)).sum(1, dtype=np.uint16)
            rows = rows[np.argpartition(differing, _SHORTLIST)[:_SHORTLIST]]
        return self._compared(asked, self._passages[rows], limit)

    def _allowed(self, those: Those) -> NDArray[np.int64]:
        kept = np.ones(len(self._passages), bool)
        if those.days:
            kept = np.zeros(len(self._passages), bool)
            for first, last in those.days:
                kept |= (self._days >= first) & (self._days <= last)
        if those.passages is not None:
            kept &= np.isin(self._passages, np.array(those.passages, np.int64), assume_unique=True)
        return np.flatnonzero(kept)

    def _compared(self, asked: NDArray[np.float32], passages: NDArray[np.int64], limit: int) -> list[tuple[int, float]]:
        marks = ",".join("?" * len(passages))
        found = self._store.rows(
            f"SELECT passage, vector FROM vectors WHERE passage IN ({marks})",  # noqa: S608  # question marks alone
            passages.tolist(),
        )
        if not found:
            return []
        vectors = np.frombuffer(b"".join(vector for _, vector in found), "<f2").reshape(len(found), -1)
        cosines = vectors.astype(np.float32) @ asked
        best = np.argsort(-cosines, kind="stable")[:limit]
        return [(int(found[place][0]), float(cosines[place])) for place in best]

    def _catch_up(self) -> None:
        """Read codes that were added since the last time, or all of them where some are gone."""
        count, last = self._store.rows("SELECT count(*), coalesce(max(number), 0) FROM codes")[0]
        if (count, last) == (len(self._passages), self._last):
            return
        new = self._read()
        if len(self._passages) + len(new) != count:
            self._forget()
            new = self._read()
        if new:
            codes = np.frombuffer(b"".join(code for *_, code in new), np.uint64).reshape(len(new), -1)
            self._codes = np.concatenate([self._codes, codes]) if len(self._passages) else codes
            self._passages = np.append(self._passages, [passage for _, passage, _, _ in new])
            self._days = np.append(self._days, [day for _, _, day, _ in new])
            self._last = new[-1][0]

    def _read(self) -> list[tuple[int, int, int, bytes]]:
        statement = "SELECT number, passage, day, code FROM codes WHERE number > ? ORDER BY number"
        return self._store.rows(statement, (self._last,))
