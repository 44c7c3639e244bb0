"""Packed = alone: the proof, on any model, that the sequences of a row do not meet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from numpy.typing import NDArray

from seqpack_jax.diagnosis import Finding, Values, find_in_loss, find_in_values, primitives_of
from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.trial import (
    Batch,
    Layout,
    Packing,
    Place,
    Run,
    Trial,
    cut,
    gap_between,
    largest,
    packings_of,
    plant,
    spaced,
    token_leaves,
    usual,
)

__all__ = ["PackingReport", "assert_packing_equivalence"]

# How far rounding may move a value, relative to the largest of its kind.
_RTOL = {"float64": 1e-10, "float32": 1e-5, "float16": 4e-3, "bfloat16": 1e-2}
_SUMS = {"float16": 5.0, "bfloat16": 5.0}  # times as much in sums over all tokens


class PackingReport(NamedTuple):
    """What `assert_packing_equivalence` has compared; differences are relative to largest values.

    Attributes:
        outputs: the largest difference of an output at a real token.
        gradients: that of a gradient of the outputs.
        loss: that of the loss and of its gradients; None without `loss_fn`.
        rtol: what was allowed.
        sequences: how many.
        rows: rows of each packed batch.
        packings: in how many ways the sequences were packed.
        compilations: of the functions given.

    Example:
        >>> PackingReport(1e-7, 2e-7, None, 1e-5, 4, 3, packings=3, compilations=3).packings
        3
    """

    outputs: float
    gradients: float
    loss: float | None
    rtol: float
    sequences: int
    rows: int
    packings: int
    compilations: int


class _Where(NamedTuple):
    """What was compared, in words, and the batch without anything planted in it."""

    name: str
    batch: Batch
    layout: Layout


class _Mismatch(Exception):
    """What differs, in words, where, and whether it is the loss."""

    def __init__(self, problem: str, where: _Where, in_loss: bool) -> None:
        super().__init__(problem)
        self.where, self.in_loss = where, in_loss


def assert_packing_equivalence(
    apply_fn: Callable[[Any, Any], Any],
    sequences: Sequence[Any],
    max_seq_len: int,
    *,
    params: Any = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    layers_fn: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    planted: str = "nan",
    gaps: bool = True,
    exact_lengths: int = 2,
    batch_statistics: bool = False,
    seed: int = 0,
) -> PackingReport:
    """Raise `AssertionError` unless a model gives for packed rows what it gives for each sequence.

    Outputs, gradients and the loss; the error says where they differ, by how much, and which kind
    of layer leaks, as far as changing a segment or the padding and looking at what moves tells.

        def apply_fn(model, batch):
            return model(batch["tokens"], batch["segment_ids"], batch["positions"])

        assert_packing_equivalence(apply_fn, sequences, 64, params=model, loss_fn=loss_fn)

    What is done.  The sequences are packed in three ways: first fit decreasing; worst fit
    decreasing, turned around; and with gaps, every segment at a multiple of 2 or more.  So each has
    other neighbours, offsets and segment numbers.  A batch has one row of padding at least, as the
    last batch of an epoch does; short lists are repeated until two rows hold two segments.

    *Alone* is a batch in which every row is a copy of the sequence, padded behind to `max_seq_len`:
    the shape is that of the packed batch, so one compilation serves all.  A model that uses padding
    would deceive this; therefore some sequences are run at their exact length too, without padding.

    Gradients are those of a sum of the outputs at real tokens, each sequence with random weights of
    its own, with respect to all float arrays of `params` and to float features.  The loss, and its
    gradients, must be that of the same sequences one per row.

    Last, everything is run again with other tokens in the padding, and NaN in float features.

    Time: one run per sequence, and two per packing, forward and backward; a dozen short sequences
    are enough.  `apply_fn` is compiled once for `[rows, max_seq_len]` and once per exact length;
    `loss_fn` likewise, and once more for one sequence per row.  Failing takes up to 100 runs more.
    Matrices are multiplied in full precision (`jax.default_matmul_precision("highest")`), and
    `jax_debug_nans` is off meanwhile: NaN is planted here, and found here.

    Args:
        apply_fn: `(params, batch) -> outputs`, a pytree of arrays `[B, L, ...]`, without dropout or
            other random numbers.  `batch` is a dict of `tokens`, `segment_ids` and `positions`,
            int32 `[B, L]`, and of the further features of the sequences.
        sequences: 1-D arrays of tokens, or records: dicts of features whose first axis is that of
            tokens.  Tokens are varied by other tokens found here, so at least two must be
            different.  Records without `"tokens"` get some that are 0.
        max_seq_len: tokens per row; at least two sequences must fit into one.
        params: any pytree: of linen, haiku or plain JAX, or an nnx module; its float arrays are
            differentiated.  None for a function that has its own.
        loss_fn: `(params, batch) -> scalar`, the mean that a training step differentiates.
        layers_fn: `(params, batch) -> {name: [B, L, ...]}`, values inside the model, in the order
            in which they come about; then the first layer that differs is named, and diagnosed.
        rtol: the largest difference, relative to the largest value of an output, or of any
            gradient.  None: by the coarsest dtype of outputs and `params`, 1e-5 for float32, 1e-2
            for bfloat16; in 16 bits five times that for gradients of `params`, which are sums.  A
            model that computes in fewer bits than these dtypes say needs its own.
        atol: added to that.
        planted: what is put into the padding of float features: `"nan"`; `"finite"`, if it is your
            batches that keep the padding 0 and not your model; tokens are changed in both cases;
            or `"nothing"`.
        gaps: also pack with padding between segments; say False if your batches have none.
        exact_lengths: at most so many lengths are also run without padding; 0 for a model that
            takes certain lengths only.
        batch_statistics: rows may meet in statistics over real tokens.  "Alone" is then a batch of
            one sequence per row, of all sequences, and `exact_lengths` is not used.
        seed: of the random weights.

    Returns:
        A `PackingReport`.

    Raises:
        AssertionError: packed is not alone.
        SeqpackError: the arguments are bad: no two sequences fit into a row, or outputs are not
            `[B, L, ...]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from seqpack_jax.model.segments import segment_mask
        >>> table = np.linspace(-1.0, 1.0, 40, dtype=np.float32).reshape(10, 4)
        >>> def mean_so_far(table, batch):
        ...     mask = segment_mask(batch["segment_ids"], causal=True)[:, 0].astype(jnp.float32)
        ...     mask /= jnp.sum(mask, axis=-1, keepdims=True)
        ...     return jnp.einsum("bqk,bkd->bqd", mask, table[batch["tokens"]])
        >>> sequences = [[5, 6, 7], [1, 2], [9, 8, 3, 4], [2, 1, 3]]
        >>> report = assert_packing_equivalence(mean_so_far, sequences, 8, params=table)
        >>> report.sequences, report.rows, report.packings, report.outputs < 1e-6
        (4, 3, 3, True)
        >>> def without_mask(table, batch):
        ...     return mean_so_far(table, batch | {"segment_ids": jnp.ones_like(batch["tokens"])})
        >>> try:
        ...     assert_packing_equivalence(without_mask, sequences, 8, params=table)
        ... except AssertionError as error:
        ...     print(str(error).split(": changing")[0].splitlines()[-1])
        - attention
    """
    caller = "assert_packing_equivalence"
    check_choice(caller, "planted", planted, ("nan", "finite", "nothing"))
    exact_lengths = check_int(caller, "exact_lengths", exact_lengths, 0)
    max_seq_len = check_int(caller, "max_seq_len", max_seq_len, 2)
    trial = Trial(caller, apply_fn, loss_fn, params, list(sequences), max_seq_len, seed)
    with jax.debug_nans(False), jax.default_matmul_precision("highest"):
        check = _Check(trial, gaps, planted, rtol, atol, batch_statistics)
        try:
            return check.all(0 if batch_statistics else exact_lengths)
        except _Mismatch as error:
            problem, diagnosis = str(error), _diagnose(check, error, layers_fn, batch_statistics)
    _raise(caller, problem, *diagnosis, check)


class _Check:
    """Compares the runs of a trial, and raises `_Mismatch` at the first that differ."""

    def __init__(
        self,
        trial: Trial,
        gaps: bool,
        planted: str,
        rtol: float | None,
        atol: float,
        batch_statistics: bool,
    ) -> None:
        self.trial, self.planted, self.atol = trial, planted, atol
        self.packings = packings_of(trial, gaps)
        trial.rows = max(len(packing.layout) for packing in self.packings) + 1
        self.packed = trial.lay(self.packings[0].layout)
        real = self.packed["segment_ids"] > 0
        leaves = token_leaves(self.packed).items()
        self.pools = {name: np.unique(leaf[real]) for name, leaf in leaves}
        if all(len(pool) < 2 for pool in self.pools.values()):
            hint = "pass at least two different tokens"
            fail(trial.caller, "all tokens of the sequences are the same", hint)
        self.alone = trial.alone(together=batch_statistics)
        coarsest = max([_RTOL[name] for name in trial.dtypes()], default=0.0)
        self.rtol = coarsest if rtol is None else rtol
        self.of_sums = 1.0
        if rtol is None:
            self.of_sums = max([_SUMS.get(name, 1.0) for name in trial.dtypes()], default=1.0)
        self.worst = {"outputs": 0.0, "gradients": 0.0, "loss": 0.0}
        names = self.alone[0].outputs
        self.scales = {name: max(usual(run.outputs[name]) for run in self.alone) for name in names}

    def all(self, exact_lengths: int) -> PackingReport:
        """Compare everything; the loss last, so that its model is right by then."""
        trial = self.trial
        exact = spaced(trial.lengths, exact_lengths, trial.size)
        for sequence in exact:
            self._check_exact(sequence)
        for batch, packing, name in self._batches():
            self._check_packed(batch, packing, name)
        if trial.loss_fn is not None:
            self._check_loss(exact)
        return PackingReport(
            self.worst["outputs"],
            self.worst["gradients"],
            None if trial.loss_fn is None else self.worst["loss"],
            self.rtol,
            len(trial.records),
            trial.rows,
            len(self.packings),
            trial.compilations,
        )

    def _batches(self) -> list[tuple[Batch, Packing, str]]:
        plain = [
            (self.trial.lay(packing.layout, gap=packing.gap), packing, packing.name)
            for packing in self.packings
        ]
        if self.planted == "nothing":
            return plain
        name = "{}, with other values in the padding"
        return plain + [
            (plant(batch, self.planted, self.pools), packing, name.format(packing.name))
            for batch, packing, _ in plain
        ]

    def _check_exact(self, sequence: int) -> None:
        trial, size = self.trial, int(self.trial.lengths[sequence])
        layout = [[sequence]] * trial.rows
        batch, exact = trial.lay(layout), trial.lay(layout, size=size)
        place = next(trial.places(exact, layout))
        try:
            expected = cut(trial.run(exact, [place]), place)
        except Exception as error:
            error.add_note(f"This was at {size} tokens without padding: exact_lengths=0 omits it.")
            raise
        name = f"a sequence padded to {trial.size} tokens, against {size} without padding"
        found = self.alone[sequence]
        where = _Where(name, batch, layout)
        self._compare(where, [place], [found], [expected])
        self._check_params("gradients", where, found.params, expected.params)

    def _check_packed(self, batch: Batch, packing: Packing, name: str) -> None:
        places = list(self.trial.places(batch, packing.layout))
        run = self.trial.run(batch, places)
        plain = self.trial.lay(packing.layout, gap=packing.gap)
        where = _Where(name, plain, packing.layout)
        expected = [self.alone[place.sequence] for place in places]
        self._compare(where, places, [cut(run, place) for place in places], expected)
        sums = {
            path: packing.copies * np.sum([each.params[path] for each in self.alone], axis=0)
            for path in run.params
        }
        self._check_params("gradients", where, run.params, sums)

    def _compare(
        self, where: _Where, places: list[Place], found: list[Run], expected: list[Run]
    ) -> None:
        """Compare outputs, and gradients of float features, token by token."""
        for kind, field in (("outputs", "outputs"), ("gradients", "inputs")):
            for path in getattr(found[0], field):
                one = [getattr(run, field)[path] for run in found]
                two = [getattr(run, field)[path] for run in expected]
                scale = max([*map(usual, two), self.scales.get(path, 0.0)])
                what = path if kind == "outputs" else f"the gradient of batch{path}"
                pairs = list(zip(places, one, two, strict=True))
                self._judge(kind, what, where, pairs, scale)

    def _check_params(
        self,
        kind: str,
        where: _Where,
        found: Mapping[str, NDArray[Any]],
        expected: Mapping[str, NDArray[Any]],
    ) -> None:
        scale = max([largest(each) for each in expected.values()], default=0.0)
        for path, alone in expected.items():
            what = "the gradient of the loss" if kind == "loss" else "the gradient of the outputs"
            what = f"{what} with respect to params{path}"
            self._judge(kind, what, where, [(None, found[path], alone)], scale, self.of_sums)

    def _judge(
        self,
        kind: str,
        what: str,
        where: _Where,
        pairs: Sequence[tuple[Place | None, NDArray[Any], NDArray[Any]]],
        scale: float,
        factor: float = 1.0,
    ) -> None:
        allowed, first, most = self.atol + self.rtol * factor * scale, "", 0.0
        for place, found, expected in pairs:
            gap = gap_between(found, expected, self.rtol, allowed)
            most = max(most, float(gap.max(initial=0.0)))
            if not first and (gap > allowed).any():
                at = np.unravel_index(int(np.argmax(gap > allowed)), gap.shape)
                first = f"{found[at]:.6g} instead of {expected[at]:.6g}"
                if place is not None:
                    spot = f"row {place.row}, segment {place.segment}, token {at[0]} of it"
                    first = f"first at {spot} (sequence {place.sequence}), {first}"
        if first:
            problem = f"{what} differs in {where.name}: {first}; by up to {most:.3g}, "
            problem += f"where rounding may make {allowed:.3g}"
            raise _Mismatch(problem, where, kind == "loss")
        self.worst[kind] = max(self.worst[kind], most / scale if scale else 0.0)

    def _check_loss(self, exact: list[int]) -> None:
        trial = self.trial
        layout, rows = trial.one_per_row()
        alone = trial.loss(trial.lay(layout, rows=rows))
        for sequence in exact:
            layout, size = [[sequence]] * trial.rows, int(trial.lengths[sequence])
            batch = trial.lay(layout)
            name = f"a sequence padded to {trial.size} tokens, against {size} without padding"
            expected = trial.loss(trial.lay(layout, size=size))
            self._compare_loss(_Where(name, batch, layout), trial.loss(batch), expected)
        for batch, packing, name in self._batches():
            self._compare_loss(_Where(name, batch, packing.layout), trial.loss(batch), alone)

    def _compare_loss(self, where: _Where, found: Any, expected: Any) -> None:
        pair = (None, np.asarray(found[0]), np.asarray(expected[0]))
        self._judge("loss", "the loss", where, [pair], abs(expected[0]))
        self._check_params("loss", where, found[1], expected[1])


def _diagnose(
    check: _Check,
    mismatch: _Mismatch,
    layers_fn: Callable[[Any, Any], Mapping[str, Any]] | None,
    batch_statistics: bool,
) -> tuple[str, list[Finding]]:
    """Return the first layer that differs, or "", and what leaks in it or in the function."""
    trial, pools, rtol = check.trial, check.pools, check.rtol
    if mismatch.in_loss:
        pair = next(row for packing in check.packings for row in packing.layout if len(row) > 1)
        return "", find_in_loss(trial, (pair[0], pair[1]), pools, rtol)
    batches = [mismatch.where.batch, check.packed, trial.lay(trial.short_rows())]
    layer, function = "", trial.apply_fn
    values: Values = trial.outputs
    if layers_fn is not None:
        layer, values = _first_layer(check, layers_fn, mismatch.where)
        function = layers_fn
    primitives = primitives_of(function, trial, check.packed)
    return layer, find_in_values(trial, values, batches, pools, primitives, rtol, batch_statistics)


def _first_layer(
    check: _Check, layers_fn: Callable[[Any, Any], Mapping[str, Any]], where: _Where
) -> tuple[str, Values]:
    """Return the name of the first layer that differs from alone, and a function of its values."""
    trial = check.trial
    values = trial.layers(layers_fn)
    alone = [values(trial.lay([[i]] * trial.rows)) for i in range(len(trial.records))]
    runs = [values(where.batch)]
    if check.planted != "nothing":
        runs.append(values(plant(where.batch, check.planted, check.pools)))
    for name in runs[0]:
        allowed = check.atol + check.rtol * max(usual(each[name]) for each in alone)
        for place in trial.places(where.batch, where.layout):
            expected = alone[place.sequence][name][0, : trial.lengths[place.sequence]]
            gaps = [gap_between(each[name][place.row, place.tokens], expected) for each in runs]
            if not all((gap <= allowed).all() for gap in gaps):
                return name, functools.partial(_of_layer, values, name)
    return "", trial.outputs


def _of_layer(values: Values, name: str, batch: Batch) -> dict[str, NDArray[Any]]:
    return {name: values(batch)[name]}


def _raise(caller: str, problem: str, layer: str, found: list[Finding], check: _Check) -> NoReturn:
    lines = [f"{caller}: {problem}."]
    if layer:
        lines.append(f"The first layer that differs is {layer!r}.")
    lines += ["What leaks:", *(f"- {each}" for each in found)] if found else []
    if not found:
        half = "half" in primitives_of(check.trial.apply_fn, check.trial, check.packed)
        bits = "; the function computes in 16 bits, so 0.05 may do" if half else ""
        lines.append("No change of a segment, of the padding or of the place showed a cause.")
        lines.append(f"Hint: if it is rounding, pass a larger rtol than {check.rtol:g}{bits}.")
    raise AssertionError("\n".join(lines))
