"""How a notebook shows what has been generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.request import RequestOutput

MAX_ROWS = 100
MAX_CHARACTERS = 2000
"""Of a text, the end of a prompt and the beginning of an output."""
_CELL = 'style="text-align: left; vertical-align: top; white-space: pre-wrap"'


class RequestOutputs(list["RequestOutput"]):
    """A list, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        return table_of(self)


def table_of(outputs: Sequence[RequestOutput]) -> str:
    """HTML, a row for each output: prompt, text, and how it ended after how many tokens."""
    rows = [row for output in outputs[:MAX_ROWS] for row in _rows(output)]
    head = "".join(f"<th {_CELL}>{name}</th>" for name in ("prompt", "output", "ended by", "tokens"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows[:MAX_ROWS])}</tbody></table>"
    num_left = sum(len(output.outputs) for output in outputs) - MAX_ROWS
    return table if num_left <= 0 else f"{table}<p>and {num_left} more</p>"


def _rows(output: RequestOutput) -> Iterator[str]:
    prompt = f"{len(output.prompt_token_ids)} token ids" if output.prompt is None else output.prompt
    if len(prompt) > MAX_CHARACTERS:
        prompt = "…" + prompt[-MAX_CHARACTERS:]
    for one in output.outputs:
        text = one.text if len(one.text) <= MAX_CHARACTERS else one.text[:MAX_CHARACTERS] + "…"
        cells = (prompt if one.index == 0 else "", text, str(one.finish_reason or ""), str(len(one.token_ids)))
        yield "<tr>" + "".join(f"<td {_CELL}>{escape(cell)}</td>" for cell in cells) + "</tr>"
