"""What exports share that write the adapter or a merged model, whichever their option says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..capabilities import Merge
from ..protocols import Exporter
from .card import Content
from .kept import Requantizing

if TYPE_CHECKING:
    from .tuned import Tuned

_MERGES: Mapping[Content, Merge] = {
    "adapter": Merge.NEVER,
    "merged": Merge.DENSE,
    "requantized": Merge.REQUANTIZE,
}


class ContentExport(Requantizing):
    """An export with the option `content`, which each gives its own default."""

    content: Content

    @property
    def merges(self) -> Merge:
        """What becomes of the adapter."""
        return _MERGES[self.content]

    @property
    def merged(self) -> Exporter:
        """What writes the merged model, where that is asked for."""
        from .stage import MergedDense, RequantizedContent

        if self.content == "merged":
            return MergedDense()
        return RequantizedContent(min_gain=self.min_gain, rounding=self.rounding)

    def needed(self, tuned: Tuned) -> int | None:
        """Return the bytes of a merged model."""
        return None if self.content == "adapter" else self.merged.needed(tuned)
