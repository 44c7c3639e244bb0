"""Run every benchmark and write what it prints to one Markdown file.

    python benchmarks/run_all.py [FILE]

FILE is `benchmarks/RESULTS.md` unless named.  Each script runs as a process of its own, one after
the other, on a machine that should have nothing else to do.  Takes about half an hour.  Set
`SEQPACK_DATA` to the folder of the real length sets to have them packed too, and `SEQPACK_BILLION`
to anything to have 1e9 lengths prepared as well, once (12 GB of disk, five minutes).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from common import REPEATS, machine_line

HERE = Path(__file__).resolve().parent
SCRIPTS = (
    "how_fast_is_a_plan",
    "how_fast_is_pack_sequences",
    "how_fast_is_random_access",
    "how_fast_is_an_epoch",
    "how_fast_is_a_batch",
    "how_fast_is_grain",
    "how_fast_is_streaming",
    "how_fast_is_a_restore",
    "how_fast_is_a_cold_file",
    "how_heavy_are_processes",
    "how_long_does_training_wait",
    "how_dense_is_each_packer",
    "how_far_from_the_optimum",
    "how_dense_is_streaming",
    "how_do_peers_compare",
    "how_fast_is_the_mask",
    "how_fast_is_attention",
    "how_many_tiles_are_scheduled",
    "how_fast_is_training",
    "how_fast_is_preparation",
)


def head() -> str:
    """Return the opening: when, where, and how to read the tables."""
    return (
        "# Benchmarks\n\n"
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, by `python benchmarks/run_all.py`.\n\n"
        f"{machine_line()}.\n\n"
        f"Times are medians of {REPEATS} runs after a warm-up.  Each yardstick, a peer or a "
        "physical limit, was measured in the same run; the head of each script says what it is.\n"
    )


def section(name: str, *options: str) -> tuple[str, bool]:
    """Run one script; return its section, and whether it ran to its end."""
    command = " ".join((f"benchmarks/{name}.py", *options))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - start
    title = " ".join((name.replace("_", " ").capitalize() + "?", *options))
    verdicts = re.findall(r"\| (yes|no) +\|$", done.stdout, re.MULTILINE)
    reached = f"; {verdicts.count('yes')} of {len(verdicts)} targets reached" if verdicts else ""
    environment = "SEQPACK_DATA=... " if _uses_data(name) else ""
    text = (
        f"## {title}\n\n`{environment}python {command}` ({seconds:.0f} s{reached})\n\n{done.stdout}"
    )
    if done.returncode:
        text += f"\nFailed:\n\n```\n{done.stderr[-2000:]}\n```\n"
    return text, done.returncode == 0


def _uses_data(name: str) -> bool:
    source = (HERE / f"{name}.py").read_text()
    return "SEQPACK_DATA" in os.environ and "SEQPACK_DATA" in source


def main() -> int:
    """Run all scripts, write the file, and return 1 if a script failed."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "RESULTS.md"
    parts, whole = [head()], True
    runs = [(name,) for name in SCRIPTS]
    if "SEQPACK_BILLION" in os.environ:
        runs.append(("how_fast_is_preparation", "--size", "1000000000", "--repeats", "1"))
    for name, *options in runs:
        print(name, *options, file=sys.stderr)
        text, ran = section(name, *options)
        parts.append(text)
        whole &= ran
    target.write_text("\n".join(parts))
    return 0 if whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
