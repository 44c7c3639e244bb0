"""Run a user's function on chosen rows: what `testing` compares and `diagnosis` looks into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import fail
from seqpack_jax.feeding.batch import pack_batch
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.packers import pack_sequences

__all__ = [
    "Batch",
    "Layout",
    "Packing",
    "Place",
    "Run",
    "Trial",
    "change",
    "cut",
    "largest",
    "packings_of",
    "plant",
    "spaced",
    "token_leaves",
]

Batch = dict[str, Any]  # tokens, segment_ids, positions and further features, [B, L, ...]
Layout = list[list[int]]  # the sequences in each row
Function = Callable[[Any, Any], Any]

_OWN = ("['segment_ids']", "['positions']")


class Packing(NamedTuple):
    """A way to pack the sequences, each of them `copies` times, segments at multiples of `gap`."""

    name: str
    layout: Layout
    copies: int
    gap: int = 1


class Place(NamedTuple):
    """Where a sequence lies in a batch."""

    row: int
    segment: int
    tokens: slice
    sequence: int


class Run(NamedTuple):
    """What a function gave for one batch, in float64, by path."""

    outputs: dict[str, NDArray[Any]]  # [B, L, ...]
    params: dict[str, NDArray[Any]]  # gradients
    inputs: dict[str, NDArray[Any]]  # gradients of float features, [B, L, ...]


class Trial:
    """A function of parameters and batches, and sequences to lay out in rows for it.

    Args:
        caller: the public function that errors shall name.
        apply_fn: `(params, batch) -> outputs`, a pytree of `[B, L, ...]`.
        loss_fn: `(params, batch) -> scalar`, or None.
        params: any pytree; its float arrays are differentiated, all else is kept.
        sequences: 1-D arrays of integers, or records.
        size: tokens per row.
        rows: of a batch, unless another number is asked for.
        seed: of what the outputs are weighed with in gradients.

    Attributes:
        compilations: how often one of the functions was compiled.
        lengths: int64 `[n]`, tokens of each sequence.
    """

    def __init__(
        self,
        caller: str,
        apply_fn: Function,
        loss_fn: Function | None,
        params: Any,
        sequences: Sequence[Any],
        size: int,
        seed: int,
    ) -> None:
        self.caller, self.size, self.rows, self.seed = caller, size, 2, seed
        self.records = [_record(caller, i, each) for i, each in enumerate(sequences)]
        self.lengths = np.array([len(each["tokens"]) for each in self.records], np.int64)
        self.compilations = 0
        self.apply_fn, self.loss_fn = apply_fn, loss_fn
        named, self._tree = jax.tree_util.tree_flatten_with_path(params)
        self._leaves = [leaf for _, leaf in named]
        self._at = [i for i, leaf in enumerate(self._leaves) if _is_float(leaf)]
        self._names = [jax.tree_util.keystr(named[i][0]) for i in self._at]
        self.floats = [jnp.asarray(self._leaves[i]) for i in self._at]
        self._types: dict[str, Any] = {}  # of the outputs
        self._forward = jax.jit(self._run_forward)
        self._loss = jax.jit(self._run_loss)

    def params_of(self, floats: Sequence[Any]) -> Any:
        """Return the parameters with other float arrays."""
        leaves = list(self._leaves)
        for i, leaf in zip(self._at, floats, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(self._tree, leaves)

    def lay(
        self, layout: Layout, *, size: int | None = None, rows: int | None = None, gap: int = 1
    ) -> Batch:
        """Return a batch of `rows` rows; `layout` has the sequences of the first of them."""
        size, rows = size or self.size, rows or self.rows
        ids = np.array([i for row in layout for i in row], np.int64)
        bins = Bins(ids, offsets_of([len(row) for row in layout]), size)
        packed = pack_batch(
            bins, self.records, size, lengths=self.lengths, rows=rows, multiple_of=gap
        )
        return packed.asdict()

    def places(self, batch: Batch, layout: Layout) -> Iterator[Place]:
        """Yield where each sequence of a layout lies in its batch."""
        for row, sequences in enumerate(layout):
            for k, sequence in enumerate(sequences, 1):
                start = int(np.argmax(batch["segment_ids"][row] == k))
                tokens = slice(start, start + int(self.lengths[sequence]))
                yield Place(row, k, tokens, sequence)

    def outputs(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Return the outputs for a batch, without gradients that mean anything."""
        return self.run(batch, []).outputs

    def layers(self, layers_fn: Function) -> Callable[[Batch], dict[str, NDArray[Any]]]:
        """Return a jitted function from a batch to what `layers_fn` gives, in its order."""
        names: list[str] = []

        @jax.jit
        def run(floats: Any, batch: Batch) -> list[Any]:
            layers = layers_fn(self.params_of(floats), batch)
            names[:] = layers  # jit would sort them
            return list(layers.values())

        def values(batch: Batch) -> dict[str, NDArray[Any]]:
            arrays = run(self.floats, batch)
            return _on_host(dict(zip(names, arrays, strict=True)))

        return values

    def run(self, batch: Batch, places: Sequence[Place]) -> Run:
        """Return the outputs for a batch, and the gradients of a weighed sum of them.

        Every sequence has weights of its own, the same wherever it lies; those at `places` count.
        """
        if not self._types:
            shapes = jax.eval_shape(self._named_outputs, self.floats, batch)
            self._types = {name: (each.shape[2:], each.dtype) for name, each in shapes.items()}
        weights = {}
        for k, (name, (shape, dtype)) in enumerate(self._types.items()):
            if jnp.issubdtype(dtype, jnp.floating):
                weights[name] = np.zeros((*batch["segment_ids"].shape, *shape), dtype)
                for place in places:
                    draw = np.random.default_rng([self.seed, place.sequence, k]).normal
                    length = self.lengths[place.sequence]
                    weights[name][place.row, place.tokens] = draw(size=(length, *shape))
        outputs, params, inputs = self._forward(self.floats, batch, weights)
        return Run(_on_host(outputs), self._by_name(params), _on_host(inputs))

    def loss(self, batch: Batch) -> tuple[float, dict[str, NDArray[Any]]]:
        """Return the loss of a batch, and its gradients with respect to the parameters."""
        value, gradients = self._loss(self.floats, batch)
        return float(value), self._by_name(gradients)

    def one_per_row(self) -> tuple[Layout, int]:
        """Return a layout of all sequences, and its number of rows, which is at least 2."""
        layout = [[i] for i in range(len(self.records))]
        return (layout, len(layout)) if len(layout) > 1 else (layout * 2, 2)

    def alone(self, together: bool = False) -> list[Run]:
        """Return the run of each sequence alone, outputs and gradients `[tokens, ...]`.

        Args:
            together: in one batch, one per row; else every row of a batch is the same sequence.
        """
        if together:
            layout, rows = self.one_per_row()
            batch = self.lay(layout, rows=rows)
            places = list(self.places(batch, layout))
            run = self.run(batch, places)
            # All share one gradient of the parameters: the first takes it, so that sums are right.
            none = {name: np.zeros_like(each) for name, each in run.params.items()}
            return [
                cut(run, place)._replace(params=none if i else run.params)
                for i, place in enumerate(places[: len(self.records)])
            ]
        found = []
        for sequence in range(len(self.records)):
            layout = [[sequence]] * self.rows
            batch = self.lay(layout)
            place = next(self.places(batch, layout))
            found.append(cut(self.run(batch, [place]), place))
        return found

    def short_rows(self) -> Layout:
        """Return a layout of as many segments per row as fit, of the shortest sequences."""
        order = np.argsort(self.lengths, kind="stable")[:4]
        layout: Layout = []
        for row in range(self.rows):
            layout.append([])
            left = self.size
            while left >= (length := self.lengths[order[(row + len(layout[-1])) % len(order)]]):
                layout[-1].append(int(order[(row + len(layout[-1])) % len(order)]))
                left -= length
        return layout

    def dtypes(self) -> set[str]:
        """Return the float dtypes of parameters and outputs; after a first run."""
        found = [leaf.dtype for leaf in self.floats] + [each for _, each in self._types.values()]
        return {dtype.name for dtype in found if jnp.issubdtype(dtype, jnp.floating)}

    def _by_name(self, gradients: Sequence[Any]) -> dict[str, NDArray[Any]]:
        return _on_host(dict(zip(self._names, gradients, strict=True)))

    def _named_outputs(self, floats: Sequence[Any], batch: Batch) -> dict[str, Any]:
        shape = batch["segment_ids"].shape
        named, _ = jax.tree_util.tree_flatten_with_path(
            self.apply_fn(self.params_of(floats), batch)
        )
        for path, leaf in named:
            if leaf.shape[:2] != shape:
                problem = f"output{jax.tree_util.keystr(path)} of apply_fn has shape {leaf.shape}"
                problem += f", but the batch is {shape}"
                fail(self.caller, problem, "return what belongs to single tokens, [B, L, ...]")
        return {f"output{jax.tree_util.keystr(path)}": leaf for path, leaf in named}

    def _run_forward(self, floats: Any, batch: Batch, weights: Any) -> tuple[Any, Any, Any]:
        self.compilations += 1  # Python runs this while JAX traces it, once per compilation
        features = {name: leaf for name, leaf in token_leaves(batch).items() if _is_float(leaf)}

        def outputs_of(floats: Any, features: Any) -> tuple[Any, Any]:
            outputs = self._named_outputs(floats, _replace(batch, features))
            differentiable = {name: outputs[name] for name in weights}
            return differentiable, outputs

        _, back, outputs = jax.vjp(outputs_of, floats, features, has_aux=True)
        return outputs, *back(weights)

    def _run_loss(self, floats: Any, batch: Batch) -> Any:
        self.compilations += 1

        def loss_of(floats: Any) -> Any:
            assert self.loss_fn is not None
            value = self.loss_fn(self.params_of(floats), batch)
            if jnp.shape(value) != () or not _is_float(value):
                problem = f"loss_fn returns {jax.tree.map(jnp.shape, value)}, not a scalar"
                fail(self.caller, problem, "return the mean that the training step differentiates")
            return value

        return jax.value_and_grad(loss_of)(floats)


def usual(array: NDArray[Any]) -> float:
    """Return the largest finite size, but for numbers far beyond most: -1e9 of a masked logit."""
    size = np.abs(array[np.isfinite(array) & (array != 0)])
    return min(float(size.max()), 100 * float(np.median(size))) if size.size else 0.0


def gap_between(
    found: NDArray[Any], expected: NDArray[Any], rtol: float = 0.0, allowed: float = 0.0
) -> NDArray[Any]:
    """Return the difference of each pair: 0 of the same infinity twice, inf with a NaN.

    A difference within `rtol` of the number expected counts `allowed` at most.
    """
    with np.errstate(invalid="ignore"):
        gap = np.where(found == expected, 0.0, np.abs(found - expected))
    gap = np.where(np.isnan(gap), np.inf, gap)
    own = rtol * np.abs(np.where(np.isfinite(expected), expected, 0.0))
    return np.where(gap <= own, np.minimum(gap, allowed), gap)


def largest(array: NDArray[Any]) -> float:
    """Return the largest absolute value that is finite, 0 if there is none."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


def cut(run: Run, place: Place) -> Run:
    """Return what a run gave for one sequence, `[tokens, ...]`."""
    outputs, inputs = (
        {path: array[place.row, place.tokens] for path, array in each.items()}
        for each in (run.outputs, run.inputs)
    )
    return Run(outputs, run.params, inputs)


def spaced(lengths: NDArray[Any], number: int, size: int) -> list[int]:
    """Return sequences of different lengths, from the shortest to the longest below `size`."""
    known, first = np.unique(lengths, return_index=True)
    first = first[(known < size) & ((known > 1) | (known.max() < 2))]
    places = np.linspace(0, len(first) - 1, min(number, len(first)))
    return [int(first[round(place)]) for place in places]


def packings_of(trial: Trial, gaps: bool) -> list[Packing]:
    """Return ways to pack the sequences, repeated until two rows hold two of them."""
    caller, size, number = trial.caller, trial.size, len(trial.records)
    if not number:
        fail(caller, "there are no sequences", "pass a dozen of different lengths")

    def rows_of(copies: int, algorithm: str, tolerance: int = 1) -> Layout:
        lengths = np.tile(trial.lengths, copies)
        bins = pack_sequences(lengths, size, algorithm=algorithm, tolerance=tolerance)
        return [[i % number for i in row] for row in bins.tolist()]

    for copies in (1, 2, 3, 4):
        layout = rows_of(copies, "first_fit_decreasing")
        pairs = sum(len(row) > 1 for row in layout)
        if pairs > 1:
            break
    if not pairs:
        hint = "pass shorter sequences, or a larger max_seq_len"
        fail(caller, f"no two sequences fit into {size} tokens", hint)
    turned = [row[::-1] for row in rows_of(copies, "worst_fit_decreasing")][::-1]
    found = [
        Packing("rows packed by first fit", layout, copies),
        Packing("rows packed by worst fit, turned around", turned, copies),
    ]
    divisors = [n for n in range(2, size // 2 + 1) if size % n == 0 and (trial.lengths % n).any()]
    if gaps and divisors:
        with_gaps = rows_of(copies, "first_fit_decreasing", divisors[0])
        name = f"rows with padding between segments (multiples of {divisors[0]}; see gaps=)"
        found.append(Packing(name, with_gaps, copies, divisors[0]))
    return found


def token_leaves(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a batch says of each token, by path; not its segment ids and positions."""
    named, _ = jax.tree_util.tree_flatten_with_path(dict(batch))
    paths = ((jax.tree_util.keystr(path), leaf) for path, leaf in named)
    return {path: leaf for path, leaf in paths if path not in _OWN}


def change(batch: Batch, where: NDArray[np.bool_], pools: Mapping[str, NDArray[Any]]) -> Batch:
    """Return a batch with other tokens, and other features, `where` it says.

    Args:
        batch: arrays `[B, L, ...]`.
        where: bool `[B, L]`.
        pools: the values that each leaf may take, by path, sorted.  Integers become others of
            them, floats get noise of the size of the largest; leaves without a pool stay.
    """
    changed = {}
    for name, leaf in token_leaves(batch).items():
        if name not in pools:
            continue
        pool, draw, other = pools[name], np.random.default_rng(7), leaf.copy()
        if _is_float(leaf):
            size = float(np.abs(pool).max(initial=0.0)) or 1.0
            other[where] = (leaf + draw.normal(size=leaf.shape) * size).astype(leaf.dtype)[where]
        elif len(pool) > 1:
            step = draw.integers(1, len(pool), leaf.shape)
            place = np.minimum(np.searchsorted(pool, leaf), len(pool) - 1)
            other[where] = pool[(place + step) % len(pool)][where]
        changed[name] = other
    return _replace(batch, changed)


def plant(batch: Batch, planted: str, pools: Mapping[str, NDArray[Any]]) -> Batch:
    """Return a batch with other tokens in its padding, and NaN or other numbers in its floats."""
    padding = batch["segment_ids"] == 0
    filled = change(batch, padding, pools)
    if planted != "nan":
        return filled
    floats = {name: leaf.copy() for name, leaf in token_leaves(filled).items() if _is_float(leaf)}
    for leaf in floats.values():
        leaf[padding] = np.nan
    return _replace(filled, floats)


def _replace(batch: Batch, leaves: Mapping[str, Any]) -> Batch:
    """Return a batch with other arrays at some paths."""
    replaced: Batch = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(jax.tree_util.keystr(path), leaf), batch
    )
    return replaced


def _record(caller: str, index: int, sequence: Any) -> dict[str, Any]:
    """Return a sequence as a record; one of features alone gets tokens, which are all 0."""
    if not isinstance(sequence, Mapping):
        return {"tokens": np.asarray(sequence)}
    if "tokens" in sequence:
        return dict(sequence)
    leaves = jax.tree.leaves(dict(sequence))
    if not leaves or np.ndim(leaves[0]) == 0:
        hint = "pass arrays, or dicts of arrays whose first axis is that of tokens"
        fail(caller, f"sequence {index} has no tokens and no features of tokens", hint)
    return {"tokens": np.zeros(len(leaves[0]), np.int32), **sequence}


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _on_host(tree: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(leaf).astype(np.float64) for name, leaf in tree.items()}
