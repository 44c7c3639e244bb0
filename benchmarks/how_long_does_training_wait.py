"""How long does the training step of the demo wait for its input?

    python benchmarks/how_long_does_training_wait.py

The demo's text, model and step: docstrings of the standard library as bytes, rows of 512 tokens, 4
of them in a batch, two layers.  Batches come from `PackedDataset`, read by threads of this process
(0 workers), and by 2 worker processes.  The wait is what `next(iterator)` takes, its share that of
the whole step.  Every step ends before the next begins, because its loss is read.  The first steps
compile, and start the workers; a run is 10 steps after them.

Yardstick: the same steps over batches that lie in memory in a list.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

from common import REPEATS, Row, quiet_grain, report, show_seconds, show_times

import seqpack_jax as sp
from seqpack_jax.demo import collect_docstrings, encode_all
from seqpack_jax.demo_model import Trainer

MAX_SEQ_LEN, ROWS, EPOCHS, STEPS, MOST = 512, 4, 1000, 10, 0.02


def train(trainer: Trainer, batches: Iterator[Any]) -> tuple[float, float]:
    """Train some steps; return the mean seconds of a step, and of its wait."""
    waited = 0.0
    start = time.perf_counter()
    for _ in range(STEPS):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        trainer.step(batch)
    return (time.perf_counter() - start) / STEPS, waited / STEPS


def measure() -> list[Row]:
    """Let all ways to read take turns, after a warm-up."""
    source = sp.pack_dataset(
        encode_all(collect_docstrings()),
        MAX_SEQ_LEN,
        batch_size=ROWS,
        epochs=EPOCHS,
        over_length="split",
    )
    trainer = Trainer()
    trainer.step(source[0])
    ways = {
        "0 workers": iter(sp.PackedDataset(source)),
        "2 workers": iter(sp.PackedDataset(source, num_workers=2)),
        "in memory": itertools.cycle([source[step] for step in range(STEPS)]),
    }
    rounds = [[train(trainer, batches) for batches in ways.values()] for _ in range(REPEATS + 1)]
    found = {
        name: [statistics.median(each) for each in zip(*runs, strict=True)]
        for name, runs in zip(ways, zip(*rounds[1:], strict=True), strict=True)
    }
    whole, wait = found.pop("in memory")
    in_memory = f"in memory {wait / whole:.2%} ({show_seconds(wait)} of {show_seconds(whole)})"
    for name in found:
        ways[name].close()
    return [
        Row(
            f"input wait of a training step, {name}",
            f"{wait / step:.2%} ({show_seconds(wait)} of {show_seconds(step)})",
            in_memory,
            f"steps {show_times(step, whole)}",
            f"< {MOST:.0%}",
            wait < MOST * step,
        )
        for name, (step, wait) in found.items()
    ]


if __name__ == "__main__":
    quiet_grain()
    report(measure())
