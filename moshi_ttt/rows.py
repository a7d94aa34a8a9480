"""The one owner of the rows of codes [K, T]: text | Moshi's codebooks | the user's.

Moshi's paper calls these rows *streams*. Here a *stream* is one generation of the batch, as the
file formats and the reports have it, and a row is a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

TEXT_ROW = 0
"""The text, in the codes of every model."""
AUDIO_ROWS = slice(1, None)
"""All codebooks, whosever they are, in the codes of every model."""
GROUPS = ("text", "first_codebook", "other_codebooks")
"""Groups of rows that losses are reported for: names of `Rows`, and of `nll.json`."""


class Codebooks(Protocol):
    """What tells the rows of a model: moshi's `LMModel` has it, and `ModelSource`."""

    @property
    def n_q(self) -> int:
        """Codebooks that the model reads: Moshi's own and the user's."""
        ...

    @property
    def dep_q(self) -> int:
        """Codebooks that the model predicts: Moshi's own."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of one model's codes are, as slices of the K axis."""

    own_codebooks: int
    user_codebooks: int

    @classmethod
    def of(cls, model: Codebooks) -> Rows:
        """The rows that a model reads."""
        return cls(model.dep_q, model.n_q - model.dep_q)

    @property
    def count(self) -> int:
        """Rows in all, K: 17 for Moshi."""
        return 1 + self.own_codebooks + self.user_codebooks

    @property
    def text(self) -> slice:
        """The text row."""
        return slice(TEXT_ROW, TEXT_ROW + 1)

    @property
    def own(self) -> slice:
        """Moshi's codebooks."""
        return slice(1, 1 + self.own_codebooks)

    @property
    def first_codebook(self) -> slice:
        """Moshi's semantic codebook."""
        return slice(1, 2)

    @property
    def other_codebooks(self) -> slice:
        """Moshi's acoustic codebooks."""
        return slice(2, 1 + self.own_codebooks)

    @property
    def spoken(self) -> slice:
        """What Moshi generates: the text row and its codebooks."""
        return slice(0, 1 + self.own_codebooks)

    @property
    def user(self) -> slice:
        """The user's codebooks."""
        return slice(1 + self.own_codebooks, self.count)

    @property
    def groups(self) -> dict[str, slice]:
        """`GROUPS` by name, in order; together they are `spoken`."""
        return {name: getattr(self, name) for name in GROUPS}
