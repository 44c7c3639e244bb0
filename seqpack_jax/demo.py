"""`seqpack-jax demo`: from text to a trained model and back from a checkpoint, in two minutes.

The text is the docstrings of the Python standard library, so it runs anywhere, without a network.
Each step is one function below, and each prints what it measured.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from seqpack_jax.demo_model import Trainer, TrainingStep, compare_with_alone, training_steps
from seqpack_jax.errors import fail
from seqpack_jax.feeding.batch import PackedBatch, unpack_batch
from seqpack_jax.feeding.pipeline import PackedSource, pack_dataset
from seqpack_jax.feeding.sequences import FlatSequences
from seqpack_jax.planning.histogram import length_histogram_from_lengths
from seqpack_jax.planning.packers import pack_length_histogram, pack_sequences
from seqpack_jax.planning.stats import PackingStats

__all__ = [
    "DemoError",
    "DemoOptions",
    "batch_digest",
    "collect_docstrings",
    "decode",
    "digest_in_fresh_process",
    "encode",
    "encode_all",
    "resume_in",
    "run_demo",
    "save_checkpoint",
]

PAD, BOS, EOS, FIRST_BYTE = 0, 1, 2, 3
LIMIT = 1e-4  # the largest difference between packed and alone that passes, float32
PROOF_ROWS = 4
TRAINING_EPOCHS = 1_000  # more than any machine gets through; an epoch costs nothing until read
STEPS_PER_LINE = 25  # of the log, where there is no terminal to draw a bar on

# Tests and vendored code of the standard library are not text that anybody reads.
_SKIPPED = set("test tests site-packages idlelib lib2to3 ensurepip turtledemo".split())


class DemoError(RuntimeError):
    """Something that the demo claims did not hold."""


@dataclass(frozen=True)
class DemoOptions:
    """What can be chosen about a run."""

    seconds: float = 60.0  # of training, at most
    batch_size: int = 4  # rows
    max_seq_len: int = 512  # tokens per row
    seed: int = 0  # of the weights and of the epochs


def run_demo(options: DemoOptions | None = None) -> int:
    """Run every step, printing as it goes; return 0, or 1 if something claimed did not hold."""
    options = options or DemoOptions()
    console = Console(highlight=False)
    # Grain reads absl flags, which a program without absl.app never parses (google/grain#1355).
    flags.FLAGS.mark_as_parsed()
    start = time.perf_counter()
    try:
        sequences = _collect(console)
        _plan(console, sequences, options.max_seq_len)
        _feed(console, sequences, options)
        trainer, iterator = _train(console, sequences, options)
        _prove(console, trainer, sequences, options)
        _resume(console, sequences, options, iterator)
    except DemoError as error:
        console.print(f"\n[bold red]FAILED:[/] {escape(str(error))}")
        return 1
    console.print(f"\n[bold green]All checks passed[/] in {time.perf_counter() - start:.0f} s.")
    return 0


def _check(holds: bool, claim: str) -> None:
    if not holds:
        raise DemoError(f"this does not hold: {claim}")


# --- 1. collect -------------------------------------------------------------------------------


def collect_docstrings() -> list[str]:
    """Return the distinct docstrings of the standard library: modules, classes and functions.

    About 7,300 texts and 1.6 MB on CPython 3.11; in the order of the paths, so the same each time.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, None] = {}  # a set that keeps the order
    gc.disable()  # syntax trees would be collected thousands of times, and JAX's hook eats Ctrl-C
    try:
        for path in sorted(root.rglob("*.py")):
            if _SKIPPED.isdisjoint(path.relative_to(root).parts):
                for node in ast.walk(_parse(path)):
                    if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                        found[text] = None
    finally:
        gc.enable()
    if not found:
        fail("collect_docstrings", f"{root} has no docstring", "use a Python with .py files there")
    return list(found)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's code
        try:
            return ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):  # templates and deliberately broken files
            return ast.Module([], [])


def encode(text: str) -> NDArray[np.uint16]:
    """Return BOS, the UTF-8 bytes of a text, each plus 3, and EOS."""
    data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)
    return np.concatenate([[BOS], data + FIRST_BYTE, [EOS]]).astype(np.uint16)


def decode(tokens: NDArray[Any]) -> str:
    """Return the text of tokens, without PAD, BOS and EOS; half a character becomes U+FFFD."""
    data = tokens[tokens >= FIRST_BYTE] - FIRST_BYTE
    return data.astype(np.uint8).tobytes().decode("utf-8", "replace")


def encode_all(texts: Iterable[str]) -> FlatSequences:
    """Encode texts into one flat token array, in their order."""
    arrays = [encode(text) for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return FlatSequences(np.concatenate(arrays), offsets)


def _collect(console: Console) -> FlatSequences:
    _heading(console, "1. Text: the docstrings of the Python standard library")
    start = time.perf_counter()
    sequences = encode_all(collect_docstrings())
    seconds = time.perf_counter() - start
    console.print(
        f"{len(sequences):,} documents, {len(sequences.tokens):,} tokens "
        f"(UTF-8 bytes, BOS, EOS) in {seconds:.1f} s"
    )
    return sequences


# --- 2. plan ----------------------------------------------------------------------------------


def _cut(sequences: FlatSequences, max_seq_len: int) -> list[NDArray[Any]]:
    """Cut over-length documents by hand, to check what the library makes of them."""
    return [
        tokens[start : start + max_seq_len]
        for tokens in sequences
        for start in range(0, len(tokens), max_seq_len)
    ]


def _plan(console: Console, sequences: FlatSequences, max_seq_len: int) -> None:
    _heading(console, f"2. Plan: {max_seq_len} tokens per row")
    pieces = [len(piece) for piece in _cut(sequences, max_seq_len)]
    over = np.count_nonzero(sequences.lengths > max_seq_len)
    console.print(f"{over:,} documents are longer and were split: {len(pieces):,} sequences")
    next_fit = pack_sequences(pieces, max_seq_len, algorithm="next_fit")
    counts, _ = length_histogram_from_lengths(pieces, max_seq_len)
    start = time.perf_counter()
    plan = pack_length_histogram(counts, max_seq_len)
    milliseconds = 1e3 * (time.perf_counter() - start)
    bound = PackingStats.from_plan(plan).lower_bound
    table = Table("")
    table.add_column("rows", justify="right")
    table.add_column("efficiency", justify="right")
    for name, rows in (
        ("one sequence per row, padded", len(pieces)),
        ("next fit, in input order", len(next_fit)),
        ("the plan, best fit decreasing", plan.num_bins),
        ("lower bound for any packing", bound),
    ):
        table.add_row(name, f"{rows:,}", f"{plan.num_tokens / (rows * max_seq_len):.2%}")
    console.print(table)
    console.print(f"planned in {milliseconds:.1f} ms")


# --- 3. feed ----------------------------------------------------------------------------------


def _make_source(sequences: FlatSequences, options: DemoOptions, *, epochs: int) -> PackedSource:
    return pack_dataset(
        sequences,
        options.max_seq_len,
        batch_size=options.batch_size,
        seed=options.seed,
        epochs=epochs,
        over_length="split",
        pad_value=PAD,
    )


def _make_loader(source: PackedSource) -> grain.DataLoader:
    # The source shuffles by itself.  One thread that reads ahead is plenty for ready-made batches.
    return grain.DataLoader(
        data_source=source,
        sampler=grain.samplers.SequentialSampler(len(source)),
        worker_count=0,
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=4),
    )


def _feed(console: Console, sequences: FlatSequences, options: DemoOptions) -> None:
    _heading(console, "3. Feed: two epochs through a Grain loader")
    source = _make_source(sequences, options, epochs=2)
    start = time.perf_counter()
    batches = list(_make_loader(source))
    seconds = time.perf_counter() - start
    shape = (options.batch_size, options.max_seq_len)
    _check(
        {(name, array.shape) for batch in batches for name, array in batch.items()}
        == {(name, shape) for name in ("tokens", "segment_ids", "positions")},
        f"every batch is tokens, segment_ids and positions of shape {list(shape)}",
    )
    want, steps = _count(_cut(sequences, options.max_seq_len)), source.steps_per_epoch
    for part in (batches[:steps], batches[steps:]):
        _check(_count(_segments(part)) == want, "an epoch holds each sequence exactly once")
    rows, tokens = 2 * source.plan.num_bins, source.stats.num_tokens
    console.print(
        f"{len(batches):,} batches of shape {list(shape)}: {rows:,} rows in {seconds:.2f} s\n"
        f"{rows / seconds:,.0f} rows/s, {2 * tokens / seconds:,.0f} tokens/s, padding not counted\n"
        f"each of the {tokens:,} tokens was seen exactly twice, once per epoch: checked"
    )


def _count(arrays: Iterable[NDArray[Any]]) -> Counter[bytes]:
    return Counter(array.astype(np.int32).tobytes() for array in arrays)


def _segments(batches: Iterable[dict[str, Any]]) -> Iterator[NDArray[Any]]:
    for batch in batches:
        yield from unpack_batch(PackedBatch(**batch, features={}))


# --- 4. train ---------------------------------------------------------------------------------


@contextmanager
def _progress(console: Console, seconds: float) -> Iterator[Callable[[TrainingStep], None]]:
    """Yield a function that shows a step: a moving bar on a terminal, else a line now and then."""

    def print_line(at: TrainingStep) -> None:
        if at.step % STEPS_PER_LINE == 0:
            console.print(str(at))  # rich would lay out the tuple

    def move_bar(at: TrainingStep) -> None:
        progress.update(task, completed=at.seconds, description=str(at))

    if not console.is_terminal:
        yield print_line
        return
    columns = BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=seconds)
        yield move_bar


def _train(console: Console, sequences: FlatSequences, options: DemoOptions) -> tuple[Trainer, Any]:
    _heading(console, f"4. Train: a Flax NNX transformer, at most {options.seconds:g} s")
    iterator = iter(_make_loader(_make_source(sequences, options, epochs=TRAINING_EPOCHS)))
    trainer = Trainer(options.seed)
    with _progress(console, options.seconds) as show:
        for at in training_steps(trainer, iterator, options.seconds, window=STEPS_PER_LINE):
            if at.step == 1:
                first = at
            show(at)
    console.print(
        f"{at.step} steps in {at.seconds:.1f} s, of which {first.seconds:.1f} s for the first, "
        f"which compiles\n"
        f"loss {first.loss:.3f} at the start, {at.loss:.3f} over the last "
        f"{min(at.step, STEPS_PER_LINE)} steps (nats per byte)\n"
        f"{at.tokens_per_second:,.0f} tokens/s after the first step, padding not counted\n"
        f"compilations of the step: {trainer.compilations}"
    )
    _check(trainer.compilations == 1, "one compilation serves all batches")
    return trainer, iterator


# --- 5. prove ---------------------------------------------------------------------------------


def _prove(
    console: Console, trainer: Trainer, sequences: FlatSequences, options: DemoOptions
) -> None:
    _heading(console, "5. Proof: packed = alone")
    source = _make_source(sequences, replace(options, batch_size=PROOF_ROWS), epochs=1)
    batches = [source[step] for step in range(min(32, len(source)))]
    batch = max(batches, key=lambda batch: batch["segment_ids"].max(axis=1).sum())  # the hardest
    result = compare_with_alone(trainer.model, batch)
    console.print(
        f"{result.sequences} sequences in {result.rows} rows, against each alone, float32"
    )
    table = Table("", "largest value", "largest difference")
    for name in ("logits", "loss", "gradients"):
        value, difference = getattr(result, name)
        table.add_row(name, f"{value:.3g}", f"{difference:.1e}")
    console.print(table)
    _check(result.sequences > result.rows, "a row of the proof holds several sequences")
    _check(result.worst < LIMIT, f"packed and alone differ by less than {LIMIT:g}")


# --- 6. stop and resume -----------------------------------------------------------------------


def batch_digest(batch: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 of a batch: names, dtypes, shapes and all bytes."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        array = batch[name]
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_checkpoint(
    folder: Path, sequences: FlatSequences, options: DemoOptions, iterator: Any
) -> None:
    """Write what a fresh process needs: the tokens, the options, and the loader's own state."""
    np.save(folder / "tokens.npy", sequences.tokens)
    np.save(folder / "offsets.npy", sequences.offsets)
    (folder / "options.json").write_text(json.dumps(asdict(options)))
    (folder / "loader.json").write_bytes(iterator.get_state())


def resume_in(folder: str | Path) -> int:
    """Go on from a checkpoint in `folder`: print the digest of the next batch.

    No batch is stored: the tokens are mapped, the plan is made anew, and the state of the loader,
    one index, says where to go on.  It also describes the source, and Grain refuses another one.
    """
    flags.FLAGS.mark_as_parsed()
    folder = Path(folder)
    if not (folder / "loader.json").is_file():
        fail("resume_in", f"{folder} holds no checkpoint", "pass a folder that the demo wrote")
    options = DemoOptions(**json.loads((folder / "options.json").read_text()))
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    offsets = np.load(folder / "offsets.npy", mmap_mode="r")
    source = _make_source(FlatSequences(tokens, offsets), options, epochs=TRAINING_EPOCHS)
    iterator = iter(_make_loader(source))
    iterator.set_state((folder / "loader.json").read_bytes())
    print(batch_digest(next(iterator)))
    return 0


def digest_in_fresh_process(folder: str | Path) -> str:
    """Return what `resume_in` prints in a Python process of its own."""
    command = [sys.executable, "-m", "seqpack_jax.cli", "demo", "--resume-in", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise DemoError(f"the fresh process ended with {result.returncode}:\n{result.stderr}")
    return result.stdout.strip()


def _resume(
    console: Console, sequences: FlatSequences, options: DemoOptions, iterator: Any
) -> None:
    _heading(console, "6. Stop, and go on in a fresh process")
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), sequences, options, iterator)
        state = (Path(folder) / "loader.json").stat().st_size
        console.print(f"the checkpoint of the loader has {state} bytes")
        there = digest_in_fresh_process(folder)
    here = batch_digest(next(iterator))
    console.print(f"next batch in this process:   sha256 {here[:32]}")
    console.print(f"next batch in a fresh one:    sha256 {there[:32]}")
    _check(here == there, "the fresh process goes on with the same batch")
    console.print("identical")


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]")
