"""Drafts by what followed the same tokens before: in the request itself, and in the outputs of others.

SuffixDecoding (arXiv 2411.04975), with the rules of its authors' ArcticInference: of all places where the last tokens
are found, those count that agree the furthest back; a draft is what most of them go on with, as long as that is as
likely as ``LEAST_PROBABILITY`` by their number; and there are no more drafts than tokens agree. Instead of a suffix
tree there is a table of short n-grams, in which a token costs two entries, whatever the depth, and whose texts can be
forgotten one by one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence

from jaxserve.request import Request

SIZES = 4, 2
"""Tokens of the n-grams. Where the longer one is found, the shorter one is not asked for."""
LONGEST_MATCH = 64
LEAST_PROBABILITY = 0.1
MAX_PLACES = 32
"""The latest ones of an n-gram are looked at: what a proposal costs is bounded."""

Place = tuple[list[int], int]
"""A text, which may still grow, and a position in it: what follows an n-gram."""


class Places:
    """Behind each n-gram of some texts."""

    def __init__(self) -> None:
        self._places: defaultdict[tuple[int, ...], list[Place]] = defaultdict(list)

    @property
    def is_empty(self) -> bool:
        return not self._places

    def add(self, text: list[int], begin: int) -> None:
        """Those behind the tokens of ``text`` from ``begin`` on."""
        for size in SIZES:
            first = max(0, begin - size + 1)
            ngrams = zip(*(text[first + i :] for i in range(size)), strict=False)
            for end, ngram in enumerate(ngrams, first + size):
                self._places[ngram].append((text, end))

    def remove(self, text: list[int]) -> None:
        for size in SIZES:
            for ngram in set(zip(*(text[i:] for i in range(size)), strict=False)):
                left = [place for place in self._places.pop(ngram, ()) if place[0] is not text]
                if left:
                    self._places[ngram] = left

    def of(self, ngram: tuple[int, ...]) -> list[Place]:
        """The latest first."""
        return self._places.get(ngram, [])[: -MAX_PLACES - 1 : -1]


class _Followed:
    """A request under way."""

    def __init__(self, request: Request) -> None:
        self.text = list(request.prompt_token_ids)
        self.output = self.text[-LONGEST_MATCH:]
        """With as much of the prompt as a match may reach back to."""
        self.places = Places()
        """In its own text."""
        self.places.add(self.text, 0)


class SuffixProposer:
    """Of one engine. Requests learn from the outputs of others of the same ``cache_salt``, those under way included."""

    def __init__(self, max_cached_tokens: int) -> None:
        """``max_cached_tokens``: of outputs of requests that have ended; those of use last are kept."""
        self._max_cached_tokens = max_cached_tokens
        self._followed: dict[str, _Followed] = {}
        self._shared: defaultdict[str, Places] = defaultdict(Places)
        """In outputs, by salt."""
        self._kept: OrderedDict[int, tuple[str, list[int]]] = OrderedDict()
        """Outputs of requests that have ended, with their salts, by identity; those of use last at the end."""
        self.num_cached_tokens = 0

    def propose(self, request: Request, most: int) -> list[int]:
        """Up to ``most`` tokens that may follow those that are known."""
        salt = _salt_of(request)
        followed = self._follow(request, salt)
        for size in SIZES:
            ngram = tuple(followed.text[-size:])
            found = [*followed.places.of(ngram), *self._shared[salt].of(ngram)]
            found = [(text, end) for text, end in found if end < len(text) and text is not followed.output]
            if found and len(ngram) == size:
                number, places = furthest(found, followed.text, size)
                self._used(places)
                # The first of them is on its way already.
                return continuation(places, min(most, 1 + number))
        return []

    def discard(self, request: Request) -> None:
        """It has ended: keep its output, and forget those that have not been of use for longest."""
        followed = self._followed.pop(request.request_id, None)
        if followed is None:
            return
        self._kept[id(followed.output)] = _salt_of(request), followed.output
        self.num_cached_tokens += len(followed.output)
        while self.num_cached_tokens > self._max_cached_tokens:
            _, (salt, text) = self._kept.popitem(last=False)
            self.num_cached_tokens -= len(text)
            self._shared[salt].remove(text)
            if self._shared[salt].is_empty:
                del self._shared[salt]

    def _follow(self, request: Request, salt: str) -> _Followed:
        """With all its tokens that are known."""
        followed = self._followed.get(request.request_id)
        if followed is None:
            followed = self._followed[request.request_id] = _Followed(request)
            self._shared[salt].add(followed.output, len(followed.output) - 1)
        new = request.known_token_ids(len(followed.text), request.num_known_tokens)
        followed.text += new
        followed.output += new
        followed.places.add(followed.text, len(followed.text) - len(new))
        self._shared[salt].add(followed.output, len(followed.output) - len(new))
        return followed

    def _used(self, places: Sequence[Place]) -> None:
        for text, _ in places:
            if id(text) in self._kept:
                self._kept.move_to_end(id(text))


def furthest(places: list[Place], text: list[int], number: int) -> tuple[int, list[Place]]:
    """The places that agree with the end of ``text`` the furthest back, and in how many tokens, up to LONGEST_MATCH.

    ``number``: of tokens in which all agree.
    """
    for back in range(number + 1, min(LONGEST_MATCH, len(text)) + 1):
        agreeing = [(other, end) for other, end in places if end >= back and other[end - back] == text[-back]]
        if not agreeing:
            return back - 1, places
        places = agreeing
    return max(number, min(LONGEST_MATCH, len(text))), places


def continuation(places: Sequence[Place], most: int) -> list[int]:
    """Up to ``most`` tokens with which most of the texts go on there, the first one where several are as many."""
    token_ids: list[int] = []
    ahead = list(places)
    while len(token_ids) < most:
        following = Counter(text[end] for text, end in ahead if end < len(text))
        token_id, number = next(iter(following.most_common(1)), (0, 0))
        if number == 0 or number < LEAST_PROBABILITY * len(places):
            break
        token_ids.append(token_id)
        ahead = [(text, end + 1) for text, end in ahead if end < len(text) and text[end] == token_id]
    return token_ids


def _salt_of(request: Request) -> str:
    return request.params.cache_salt or ""
