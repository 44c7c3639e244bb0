"""Every Python block of the page on attention runs, in order, and prints what the page says."""

import re
from pathlib import Path

from test_readme import blocks_of, wrong_blocks

import seqpack_jax
from seqpack_jax.model import attention, losses, segments

PAGE = Path(seqpack_jax.__file__).with_name("ATTENTION.md").read_text()
BLOCKS = blocks_of(PAGE)


def test_the_blocks_run_and_print_what_they_say():
    assert len(BLOCKS) == PAGE.count("```python") >= 6
    assert wrong_blocks(BLOCKS) == []


def test_that_check_can_fail():
    code, printed = BLOCKS[0]
    assert wrong_blocks([(code, printed.replace("1", "2", 1))]) == [0]


def test_nothing_is_left_out():
    doors = [name for name in attention.__all__ if name.startswith("to_")]
    assert len(doors) >= 9
    for name in (*doors, "packed_attention", "PackedSelfAttention", "blocked_attention"):
        assert f"`{name}" in PAGE or f"{name}(" in PAGE, name
    public = {*attention.__all__, *losses.__all__, *segments.__all__}
    for name in set(re.findall(r"(?:attention|losses|segments)\.(\w+)\(", PAGE)):
        assert name in public, name


def test_the_lines_are_short():
    assert max(len(line) for line in PAGE.splitlines() if not line.startswith("|")) <= 100
