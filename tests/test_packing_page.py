"""Every Python block of the algorithms page runs, in order, and prints what the page says."""

from pathlib import Path

from test_readme import blocks_of, wrong_blocks

import seqpack_jax
from seqpack_jax.planning.over_length import ACTIONS
from seqpack_jax.planning.packers import ALGORITHMS

PAGE = Path(seqpack_jax.__file__).with_name("PACKING.md").read_text()
BLOCKS = blocks_of(PAGE)


def test_the_blocks_run_and_print_what_they_say():
    assert len(BLOCKS) == PAGE.count("```python") >= 8
    assert wrong_blocks(BLOCKS) == []


def test_that_check_can_fail():
    code, printed = BLOCKS[0]
    assert wrong_blocks([(code, printed.replace("1", "2", 1))]) == [0]


def test_nothing_is_left_out():
    for algorithm in (*ALGORITHMS, "next_fit"):
        words = algorithm.replace("_", " ").removesuffix(" decreasing")
        assert f"**{words.capitalize()}.**" in PAGE or f"## {words.capitalize()}" in PAGE, algorithm
    for action in ACTIONS:
        assert f'| `"{action}"` |' in PAGE, action


def test_the_lines_are_short():
    assert max(len(line) for line in PAGE.splitlines() if not line.startswith("|")) <= 100
