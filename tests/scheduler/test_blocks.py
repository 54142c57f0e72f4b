"""KV blocks balance whatever is taken and given back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.blocks import BlockManager
from tests.scheduler.driver import BLOCK_SIZE


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["grow", "release_before", "release"]), st.sampled_from("abc"), st.integers(-9, 90))
    )
)
def test_blocks_balance_whatever_is_taken_and_given_back(calls: list[tuple[str, str, int]]) -> None:
    blocks = BlockManager(20, BLOCK_SIZE)
    tables: dict[str, list[int]] = {}
    for name, request_id, num_tokens in calls:
        table = tables.setdefault(request_id, [])
        if name == "grow":
            if num_tokens > blocks.room(request_id):
                continue
            blocks.grow(request_id, num_tokens)
            added = blocks.table(request_id)[len(table) :]
            assert len(added) == max(0, -(-num_tokens // BLOCK_SIZE) - len(table))
            assert all(added)
            table += added
        elif name == "release_before":
            blocks.release_before(request_id, num_tokens)
            below = [(index + 1) * BLOCK_SIZE <= num_tokens for index in range(len(table))]
            table[:] = [0 if gone else block for gone, block in zip(below, table, strict=True)]
        else:
            blocks.release(request_id)
            table.clear()
        blocks.check()
        num_used = sum(block > 0 for table in tables.values() for block in table)
        assert blocks.num_used == num_used
        for other, expected in tables.items():
            assert blocks.table(other) == expected
            assert blocks.room(other) == (len(expected) + 19 - num_used) * BLOCK_SIZE


def test_blocks_notice_a_lost_block() -> None:
    blocks = BlockManager(10, BLOCK_SIZE)
    blocks.grow("a", 20)
    blocks.check()
    blocks.table("a").pop()
    with pytest.raises(RuntimeError, match="do not balance: 6 free \\+ 2 used of 9"):
        blocks.check()
