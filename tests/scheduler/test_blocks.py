"""KV blocks balance whatever is taken and given back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.blocks import BlockManager
from tests.scheduler.driver import BLOCK_SIZE, block_table


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["grow", "release_before", "release"]), st.integers(0, 2), st.integers(-9, 90)))
)
def test_blocks_balance_whatever_is_taken_and_given_back(calls: list[tuple[str, int, int]]) -> None:
    blocks = BlockManager(20, BLOCK_SIZE, 3, 96)
    tables: dict[int, list[int]] = {}
    for name, slot, num_tokens in calls:
        table = tables.setdefault(slot, [])
        if name == "grow":
            if num_tokens > blocks.room(slot):
                continue
            blocks.grow(slot, num_tokens)
            added = block_table(blocks, slot)[len(table) :]
            assert len(added) == max(0, -(-num_tokens // BLOCK_SIZE) - len(table))
            assert all(added)
            table += added
        elif name == "release_before":
            blocks.release_before(slot, num_tokens)
            below = [(index + 1) * BLOCK_SIZE <= num_tokens for index in range(len(table))]
            table[:] = [0 if gone else block for gone, block in zip(below, table, strict=True)]
        else:
            blocks.release(slot)
            table.clear()
        blocks.check()
        num_used = sum(block > 0 for table in tables.values() for block in table)
        assert blocks.num_used == num_used
        for other, expected in tables.items():
            assert block_table(blocks, other) == expected
            assert blocks.room(other) == (len(expected) + 19 - num_used) * BLOCK_SIZE


def test_blocks_notice_a_lost_block() -> None:
    blocks = BlockManager(10, BLOCK_SIZE, 3, 96)
    blocks.grow(1, 20)
    blocks.check()
    blocks.tables[1, 2] = 0
    with pytest.raises(RuntimeError, match="do not balance: 6 free \\+ 2 used of 9"):
        blocks.check()
