"""`seqpack-jax demo`: from text to a trained model and back from a checkpoint, in two minutes.

The text is the docstrings of the Python standard library, so it runs anywhere, without a network.
Each step is one function below, and each prints what it measured.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from absl import flags
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from seqpack_jax.demo_model import Trainer, compare_with_alone
from seqpack_jax.errors import fail
from seqpack_jax.feeding.batch import FlatSequences, PackedBatch, unpack_batch
from seqpack_jax.feeding.pipeline import PackedSource
from seqpack_jax.planning.histogram import Int64, length_histogram_from_lengths
from seqpack_jax.planning.packers import pack_length_histogram, pack_sequences
from seqpack_jax.planning.plan import PackingPlan
from seqpack_jax.planning.stats import PackingStats

__all__ = [
    "DemoError",
    "DemoOptions",
    "collect_docstrings",
    "decode",
    "encode",
    "encode_all",
    "resume_in",
    "run_demo",
]

PAD, BOS, EOS, FIRST_BYTE = 0, 1, 2, 3
LIMIT = 1e-4  # the largest difference between packed and alone that passes, float32
PROOF_ROWS = 4
TRAINING_EPOCHS = 1_000  # more than any machine gets through; an epoch costs nothing until read
STEPS_PER_LINE = 25  # of the log, where there is no terminal to draw a bar on

# Tests and vendored code of the standard library are not text that anybody reads.
_SKIPPED = {
    "test", "tests", "site-packages", "idlelib", "lib2to3", "ensurepip", "turtledemo",
}  # fmt: skip


class DemoError(RuntimeError):
    """Something that the demo claims did not hold."""


@dataclass(frozen=True)
class DemoOptions:
    """What can be chosen about a run.

    Attributes:
        seconds: how long to train.
        batch_size: rows per batch.
        max_seq_len: tokens per row.
        seed: seeds the weights and the epochs.
    """

    seconds: float = 60.0
    batch_size: int = 8
    max_seq_len: int = 512
    seed: int = 0


def run_demo(options: DemoOptions | None = None) -> int:
    """Run every step, printing as it goes; return 0, or 1 if something claimed did not hold."""
    options = options or DemoOptions()
    console = Console(highlight=False)
    # Grain reads absl flags, which a program without absl.app never parses (google/grain#1355).
    flags.FLAGS.mark_as_parsed()
    start = time.perf_counter()
    try:
        sequences = _collect(console)
        plan = _plan(console, sequences.lengths, options.max_seq_len)
        _feed(console, plan, sequences, options)
        trainer, iterator = _train(console, sequences, options)
        _prove(console, trainer, sequences, options)
        _resume(console, sequences, options, iterator)
    except DemoError as error:
        console.print(f"\n[bold red]FAILED:[/] {error}")
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
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            for node in ast.walk(_parse(path)):
                if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                    found[text] = None
    if not found:
        fail("demo", "no docstring was found", "run it where the standard library is .py files")
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
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    ends = np.array([BOS], np.uint16), np.array([EOS], np.uint16)
    return np.concatenate([ends[0], data.astype(np.uint16) + np.uint16(FIRST_BYTE), ends[1]])


def decode(tokens: NDArray[Any]) -> str:
    """Return the text of tokens, without PAD, BOS and EOS; half a character becomes U+FFFD."""
    data = tokens[tokens >= FIRST_BYTE] - FIRST_BYTE
    try:
        return data.astype(np.uint8).tobytes().decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # a split document may begin or end inside a character
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
        f"{len(sequences):,} documents, {len(sequences.tokens):,} tokens (UTF-8 bytes, BOS, EOS), "
        f"in {seconds:.1f} s"
    )
    return sequences


# --- 2. plan ----------------------------------------------------------------------------------


def _split_lengths(lengths: Int64, max_seq_len: int) -> Int64:
    """Return the lengths after splitting over-length documents, in the order of the documents."""
    pieces = -(-lengths // max_seq_len)
    result = np.full(pieces.sum(), max_seq_len)
    result[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * max_seq_len
    return result


def _plan(console: Console, lengths: Int64, max_seq_len: int) -> PackingPlan:
    _heading(console, f"2. Plan: {max_seq_len} tokens per row")
    pieces = _split_lengths(lengths, max_seq_len)
    over = int(np.count_nonzero(lengths > max_seq_len))
    console.print(f"{over:,} documents are longer and were split: {len(pieces):,} sequences")
    next_fit = pack_sequences(pieces, max_seq_len, algorithm="next_fit")
    counts, _ = length_histogram_from_lengths(pieces, max_seq_len)
    start = time.perf_counter()
    plan = pack_length_histogram(counts, max_seq_len)
    milliseconds = 1e3 * (time.perf_counter() - start)
    bound = PackingStats.from_plan(plan).lower_bound
    table = Table("", "rows", "useful tokens")
    for name, rows in (
        ("one sequence per row, padded", len(pieces)),
        ("next fit, in input order", len(next_fit)),
        ("the plan, best fit decreasing", plan.num_bins),
        ("lower bound for any packing", bound),
    ):
        table.add_row(name, f"{rows:,}", f"{plan.num_tokens / (rows * max_seq_len):.2%}")
    table.columns[1].justify = table.columns[2].justify = "right"
    console.print(table)
    console.print(f"planned in {milliseconds:.1f} ms")
    return plan


# --- 3. feed ----------------------------------------------------------------------------------


def _make_source(
    sequences: FlatSequences, options: DemoOptions, *, epochs: int, batch_size: int | None = None
) -> PackedSource:
    counts, pools = length_histogram_from_lengths(
        sequences.lengths, options.max_seq_len, over_length="split"
    )
    plan = pack_length_histogram(counts, options.max_seq_len)
    size = batch_size or options.batch_size
    return PackedSource(
        plan, pools, sequences, seed=options.seed, epochs=epochs, batch_size=size, pad_value=PAD
    )


def _make_loader(source: PackedSource) -> grain.DataLoader:
    # The source shuffles by itself.  One thread that reads ahead is plenty for ready-made batches.
    return grain.DataLoader(
        data_source=source,
        sampler=grain.samplers.SequentialSampler(len(source)),
        worker_count=0,
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=4),
    )


def _feed(
    console: Console, plan: PackingPlan, sequences: FlatSequences, options: DemoOptions
) -> None:
    _heading(console, f"3. Feed: two epochs, batches of [{options.batch_size}, L]")
    source = _make_source(sequences, options, epochs=2)
    start = time.perf_counter()
    batches = list(_make_loader(source))
    seconds = time.perf_counter() - start
    shapes = {(name, item[name].shape) for item in batches for name in item}
    expected = (options.batch_size, options.max_seq_len)
    _check(
        shapes == {(name, expected) for name in ("tokens", "segment_ids", "positions")},
        f"every batch is tokens, segment_ids and positions of shape {list(expected)}",
    )
    want = _split_counter(sequences, options.max_seq_len)
    for epoch in range(2):
        part = batches[epoch * source.steps_per_epoch : (epoch + 1) * source.steps_per_epoch]
        _check(_segment_counter(part) == want, f"epoch {epoch} holds each sequence exactly once")
    rows, tokens = 2 * plan.num_bins, 2 * plan.num_tokens
    console.print(
        f"{len(batches):,} batches of one shape, {rows:,} rows in {seconds:.2f} s: "
        f"{rows / seconds:,.0f} rows/s, {tokens / seconds:,.0f} tokens/s\n"
        f"each of the {plan.num_tokens:,} tokens was seen exactly twice, once per epoch: checked"
    )


def _split_counter(sequences: FlatSequences, max_seq_len: int) -> Counter[bytes]:
    """Count the pieces that the batches must hold, cut here and not by the library."""
    return Counter(
        tokens[start : start + max_seq_len].astype(np.int32).tobytes()
        for tokens in map(sequences.__getitem__, range(len(sequences)))
        for start in range(0, len(tokens), max_seq_len)
    )


def _segment_counter(items: Sequence[dict[str, Any]]) -> Counter[bytes]:
    """Count the segments of batches by their tokens."""
    counter: Counter[bytes] = Counter()
    for item in items:
        segments = unpack_batch(PackedBatch(**item, features={}))
        counter.update(segments[k].tobytes() for k in range(len(segments)))
    return counter


# --- 4. train ---------------------------------------------------------------------------------


class TrainingStep(NamedTuple):
    """Where training stands after a step."""

    step: int
    seconds: float  # since the start
    loss: float  # mean of the last steps, nats per token
    tokens_per_second: float  # without padding, and without the first step, which compiles


def training_steps(
    trainer: Trainer, batches: Iterator[dict[str, Any]], seconds: float
) -> Iterator[TrainingStep]:
    """Train for at most `seconds`, but for two steps at least."""
    start = now = time.perf_counter()
    losses: list[float] = []
    tokens = 0
    while len(losses) < 2 or 2 * now - before - start <= seconds:
        loss, fed = trainer.step(next(batches))
        before, now = now, time.perf_counter()
        losses.append(loss)
        if len(losses) == 1:
            compiled = now
        else:
            tokens += fed
        rate = tokens / (now - compiled) if tokens else 0.0
        mean = float(np.mean(losses[-STEPS_PER_LINE:]))
        yield TrainingStep(len(losses), now - start, mean, rate)


@contextmanager
def _progress(console: Console, seconds: float) -> Iterator[Any]:
    """Yield a function that shows a `TrainingStep`: a bar on a terminal, a line now and then."""

    def sentence(at: TrainingStep) -> str:
        return f"step {at.step}: loss {at.loss:.3f}, {at.tokens_per_second:,.0f} tokens/s"

    if not console.is_terminal:
        yield lambda at: at.step % STEPS_PER_LINE or console.print(sentence(at))
        return
    columns = BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=seconds)
        yield lambda at: progress.update(task, completed=at.seconds, description=sentence(at))


def _train(console: Console, sequences: FlatSequences, options: DemoOptions) -> tuple[Trainer, Any]:
    _heading(console, f"4. Train: a Flax NNX transformer, at most {options.seconds:g} s")
    iterator = iter(_make_loader(_make_source(sequences, options, epochs=TRAINING_EPOCHS)))
    trainer = Trainer(options.seed)
    with _progress(console, options.seconds) as show:
        for at in training_steps(trainer, iterator, options.seconds):
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
    source = _make_source(sequences, options, epochs=1, batch_size=PROOF_ROWS)
    result = compare_with_alone(trainer.model, source[0])
    console.print(
        f"{result.rows} packed rows of {result.sequences} sequences, against each one alone "
        "(float32)"
    )
    table = Table("", "largest value", "largest difference")
    for name in ("logits", "loss", "gradients"):
        value, difference = getattr(result, name)
        table.add_row(name, f"{value:.3g}", f"{difference:.1e}")
    console.print(table)
    _check(result.sequences > result.rows, "the rows of the proof hold more than one sequence")
    _check(result.worst < LIMIT, f"packed and alone differ by less than {LIMIT:g}")


# --- 6. stop and resume -----------------------------------------------------------------------


class _Resumable(Protocol):
    """What is needed of a Grain iterator."""

    def __next__(self) -> dict[str, NDArray[np.int32]]: ...
    def get_state(self) -> bytes: ...


def _digest(batch: dict[str, NDArray[np.int32]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(batch):
        array = batch[name]
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_checkpoint(
    folder: Path, sequences: FlatSequences, options: DemoOptions, iterator: _Resumable
) -> None:
    """Write what a fresh process needs: the tokens, the options, and the loader's own state."""
    np.save(folder / "tokens.npy", sequences.tokens)
    np.save(folder / "offsets.npy", sequences.offsets)
    (folder / "options.json").write_text(json.dumps(asdict(options)))
    (folder / "loader.json").write_bytes(iterator.get_state())


def resume_in(folder: str | Path) -> int:
    """Go on from a checkpoint in `folder`: print the digest of the next batch.

    No batch is stored: the tokens are mapped, the plan is made anew, and the state of the loader,
    one number, says where to go on.  Grain refuses the state if the plan is a different one.
    """
    flags.FLAGS.mark_as_parsed()
    folder = Path(folder)
    if not (folder / "loader.json").is_file():
        fail("demo", f"{folder} holds no checkpoint", "pass a folder that the demo wrote")
    options = DemoOptions(**json.loads((folder / "options.json").read_text()))
    tokens, offsets = (
        np.load(folder / name, mmap_mode="r") for name in ("tokens.npy", "offsets.npy")
    )
    source = _make_source(FlatSequences(tokens, offsets), options, epochs=TRAINING_EPOCHS)
    iterator = iter(_make_loader(source))
    iterator.set_state((folder / "loader.json").read_bytes())
    print(_digest(next(iterator)))
    return 0


def digest_in_fresh_process(folder: str | Path) -> str:
    """Return what `resume_in` prints in a Python process of its own."""
    command = [sys.executable, "-m", "seqpack_jax.cli", "demo", "--resume-in", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise DemoError(f"the fresh process ended with {result.returncode}:\n{result.stderr}")
    return result.stdout.strip()


def _resume(
    console: Console, sequences: FlatSequences, options: DemoOptions, iterator: _Resumable
) -> None:
    _heading(console, "6. Stop, and go on in a fresh process")
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), sequences, options, iterator)
        state = (Path(folder) / "loader.json").stat().st_size
        console.print(f"the loader's checkpoint has {state} bytes")
        resumed = digest_in_fresh_process(folder)
    here = _digest(next(iterator))
    console.print(f"next batch here:              sha256 {here[:32]}")
    console.print(f"next batch, fresh process:    sha256 {resumed[:32]}")
    _check(resumed == here, "the fresh process goes on with the same batch")
    console.print("identical")


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]")
