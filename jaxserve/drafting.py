"""What the host knows of a request's drafts: how well they do, and which ones it proposes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(slots=True)
class Acceptance:
    """How likely a request's next draft is to hold, by the latest of them."""

    num_held: float = 0.0
    num_tried: float = 0.0
    """Drafts that held, and these with those that were the first not to: each step's count less than the next one's."""

    @property
    def rate(self) -> float:
        """Half, while nothing is known."""
        return (self.num_held + 0.5) / (self.num_tried + 1.0)

    def note(self, num_drafts: int, num_held: int) -> None:
        """What became of a step's drafts; none tell nothing."""
        if num_drafts:
            self.fade(0.8)
            self.num_held += num_held
            self.num_tried += num_held + (num_held < num_drafts)

    def fade(self, factor: float = 0.9) -> None:
        """Know less: a text changes, so who gets no drafts is tried again some time."""
        self.num_held *= factor
        self.num_tried *= factor


class Suggestion(NamedTuple):
    """What the host expects to follow the tokens that it knows of a request. The device may have more of them by then:
    it drafts what is left, if these were the first ones of it."""

    start: int
    """The position of the first one."""
    token_ids: Sequence[int]

    def left_after(self, token_ids: Sequence[int]) -> Sequence[int]:
        """What is left once these have come, from ``start`` on; nothing where others were expected."""
        number = len(token_ids)
        return self.token_ids[number:] if list(self.token_ids[:number]) == list(token_ids) else ()
