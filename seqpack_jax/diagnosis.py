"""Which kind of layer leaks between packed sequences, found by changing a batch and looking on.

A function from batches to values of each token is a black box here, but for two things: its input
can be changed at chosen tokens, and the primitives that it consists of can be listed.  A segment
that is changed must move no token but its own, padding must move nothing, and where in its row a
segment lies must not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from seqpack_jax.trial import Batch, Trial, change, plant, usual

__all__ = ["Finding", "Values", "find_in_loss", "find_in_values", "primitives_of"]

Values = Callable[[Batch], dict[str, NDArray[Any]]]  # float64 [B, L, ...], by name
Pools = Mapping[str, NDArray[Any]]

_HALF = ("bfloat16", "float16")
_LIMIT = 24  # segments of a batch that are changed, one run each


class Finding(NamedTuple):
    """What leaks, and what showed it.

    Attributes:
        kind: the kind of layer: "attention", "recurrent state", "attention or recurrent state",
            "normalisation over the row", "convolution", "batch statistics", "padding",
            "embedding of positions", "segment number", "randomness", "NaN"; of a loss "labels",
            "segment ids as weights", "padding in the loss", "denominator" or "mean of means".
        evidence: one sentence.
    """

    kind: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.evidence}"


class _Spread(NamedTuple):
    """Where values move when single segments change."""

    rows: bool = False  # in other rows
    before: bool = False  # at tokens of the row before the segment
    after: bool = False  # and behind it
    cut: bool = False  # the movement stops before the end of the row, as suddenly as it began
    fades: bool = False  # it becomes less than a thousandth on its way
    reach: int = 0  # tokens from the segment to the last that moves
    example: str = ""


def find_in_values(
    trial: Trial,
    values: Values,
    batches: list[Batch],
    pools: Pools,
    primitives: set[str],
    rtol: float,
    rows_may_meet: bool = False,
) -> list[Finding]:
    """Return what leaks in a function, by changing its batches; empty if nothing is seen to.

    Time: some 30 runs for each batch.

    Args:
        trial: lays sequences out.
        values: the function.
        batches: packed ones, all of one shape.
        pools: as for `change`.
        primitives: what `primitives_of` found in the function.
        rtol: relative differences above it are none of rounding.  Where nothing leaks, what does
            not change is the same to the bit, so far less counts as movement.
        rows_may_meet: rows may move each other, as by batch statistics over real tokens.
    """
    least = 0.01 * rtol
    spreads = [_spread(values, batch, pools, least) for batch in batches]
    found = _name_spread(spreads, primitives, rows_may_meet)
    found += _find_padding(values, batches, pools, least, primitives, bool(found))
    found_nan = _find_nan(values, batches)
    if not found and not found_nan:
        found += _find_place(trial, values, max(rtol, 1e-2 if "half" in primitives else 0.0))
    return found + found_nan


def _find_nan(values: Values, batches: list[Batch]) -> list[Finding]:
    cause = "a row of the mask without a key and a bias of -inf, or a division by 0"
    for where, is_there in (("at real tokens", np.greater), ("on padding", np.equal)):
        for batch in batches:
            tokens = is_there(batch["segment_ids"], 0)
            if not all(np.isfinite(array[tokens]).all() for array in values(batch).values()):
                evidence = f"NaN or inf {where}, where no input has any: {cause}"
                return [Finding("NaN", evidence + "; gradients turn NaN by 0 x NaN")]
    return []


def _effect(before: dict[str, NDArray[Any]], after: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Return `[B, L]`: how far each token moved, relative to the usual values; inf for new NaN."""
    effects = []
    for name, old in before.items():
        new = after[name]
        scale = usual(old) or 1.0
        with np.errstate(invalid="ignore"):
            moved = np.where((old == new) | (np.isnan(old) & np.isnan(new)), 0.0, np.abs(old - new))
        moved = np.where(np.isnan(moved), np.inf, moved) / scale
        effects.append(moved.reshape(*moved.shape[:2], -1).max(axis=2, initial=0.0))
    result: NDArray[Any] = np.max(effects, axis=0)
    return result


def _segments(ids: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield row and number of segments, the first of each row first, at most `_LIMIT`."""
    pairs = [(int(k), row) for row in range(len(ids)) for k in np.unique(ids[row]) if k > 0]
    return ((row, k) for k, row in sorted(pairs)[:_LIMIT])


def _spread(values: Values, batch: Batch, pools: Pools, least: float) -> _Spread:
    ids, base, found = batch["segment_ids"], values(batch), _Spread()
    for row, k in _segments(ids):
        where = np.zeros(ids.shape, bool)
        where[row] = ids[row] == k
        effect = _effect(base, values(change(batch, where, pools)))
        moved = (effect > least) & (ids > 0) & ~where
        rows = bool(np.delete(moved, row, axis=0).any())
        (inside,) = np.nonzero(where[row])
        start, stop = int(inside[0]), int(inside[-1]) + 1
        forward = _one_way(effect[row, stop:], moved[row, stop:], ids[row, stop:] > 0)
        backward = _one_way(effect[row, :start], moved[row, :start], ids[row, :start] > 0, True)
        if not (rows or forward[0] or backward[0]):
            continue
        if not found.example:
            found = found._replace(example=f"segment {k} of row {row}")
        found = found._replace(
            rows=found.rows or rows,
            before=found.before or backward[0] > 0,
            after=found.after or forward[0] > 0,
            cut=found.cut or forward[1] or backward[1],
            fades=found.fades or forward[2],
            reach=max(found.reach, forward[0], backward[0]),
        )
    return found


def _one_way(
    effect: NDArray[Any], moved: NDArray[Any], real: NDArray[Any], back: bool = False
) -> tuple[int, bool, bool]:
    """Return how far a movement reaches, whether it stops suddenly, and whether it fades."""
    if back:
        effect, moved, real = effect[::-1], moved[::-1], real[::-1]
    if not moved.any():
        return 0, False, False
    last = int(np.flatnonzero(moved)[-1])
    fades = bool(effect[last] < 1e-3 * effect[moved].max())
    return last + 1, bool(real[last + 1 :].any()) and not fades, fades


def _name_spread(
    spreads: list[_Spread], primitives: set[str], rows_may_meet: bool
) -> list[Finding]:
    seen = [each for each in spreads if each.rows or each.before or each.after]
    if not seen:
        return []
    what = f"changing {seen[0].example} moves"
    if any(each.rows for each in seen):
        if rows_may_meet:
            return []
        return [Finding("batch statistics", f"{what} tokens of other rows")]
    if any(each.cut for each in seen):
        reach = min(each.reach for each in seen if each.cut)
        evidence = f"{what} only tokens near it in the row, up to {reach} away: a convolution or a"
        return [Finding("convolution", f"{evidence} token shift that reaches over the boundary")]
    if any(each.before for each in seen):
        evidence = f"{what} other segments of the row, earlier ones too: "
        if "row" in primitives:
            evidence += "the function reduces over all tokens of a row (mean, norm or pooling)"
            return [Finding("normalisation over the row", evidence)]
        return [Finding("attention", evidence + "attention without a segment mask")]
    evidence = f"{what} later tokens of the row"
    kinds = primitives & {"square", "steps", "loop"}
    if any(each.fades for each in seen) or kinds == {"steps"}:
        return [Finding("recurrent state", f"{evidence}: a state that no boundary resets")]
    if kinds == {"square"}:
        evidence += ", to its end: causal attention without a segment mask"
        return [Finding("attention", evidence)]
    evidence += ": attention without a segment mask, or a state that no boundary resets"
    return [Finding("attention or recurrent state", evidence)]


def _find_padding(
    values: Values,
    batches: list[Batch],
    pools: Pools,
    least: float,
    primitives: set[str],
    leaks: bool,
) -> list[Finding]:
    for batch in batches:
        ids, base = batch["segment_ids"], values(batch)
        rows = [row for row in range(len(ids)) if 0 < np.count_nonzero(ids[row]) < ids.shape[1]]
        for row in rows[:3]:
            where = np.zeros(ids.shape, bool)
            where[row] = ids[row] == 0
            moved = (_effect(base, values(change(batch, where, pools))) > least) & (ids > 0)
            if not moved.any():
                continue
            evidence = f"changing the padding of row {row} moves real tokens"
            if np.delete(moved, row, axis=0).any():
                kind = "batch statistics"
                evidence += " of other rows: padding counts in them"
            elif "row" in primitives:
                kind = "normalisation over the row"
                evidence += " of the row: padding counts in a mean, norm or pooling"
            else:
                kind, evidence = "padding", f"{evidence} of the row: they attend to it"
            return [Finding(kind, evidence)]
    for batch in batches:
        base = values(batch)
        moved = _effect(base, values(plant(batch, "nan", pools))) > least
        if (moved & (batch["segment_ids"] > 0)).any() and not leaks:
            evidence = "NaN in the padding reaches real tokens, though other values there do not: "
            evidence += "they are multiplied by 0, not dropped; set them to 0 with jnp.where first"
            return [Finding("padding", evidence)]
    return []


def _find_place(trial: Trial, values: Values, rtol: float) -> list[Finding]:
    """Look at one sequence in places that differ; called when no other token moves it."""
    order = [int(each) for each in np.argsort(trial.lengths, kind="stable")]
    short = order[0]
    fits = [i for i in order if trial.lengths[i] > trial.lengths[short]]
    other = fits[0] if fits else short

    def at(before: list[int]) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return what comes out for the shortest sequence behind `before`, in two rows."""
        layout = [[*before, short]] * trial.rows
        batch = trial.lay(layout)
        places = [each for each in trial.places(batch, layout) if each.segment == len(before) + 1]
        found = values(batch)
        one, two = (
            {name: array[place.row, None, place.tokens] for name, array in found.items()}
            for place in (places[0], places[-1])
        )
        return one, two

    def differ(one: dict[str, NDArray[Any]], two: dict[str, NDArray[Any]]) -> bool:
        return bool((_effect(one, two) > rtol).any())

    first, again = at([])
    if differ(first, again):
        evidence = "a sequence depends on the row that it is in: dropout, or other random numbers"
        return [Finding("randomness", f"{evidence}; switch them off")]
    behind, further = at([short])[0], None
    if trial.lengths[other] + trial.lengths[short] <= trial.size:
        further = at([other])[0]
    if not differ(first, behind) and (further is None or not differ(first, further)):
        return _find_amount(trial, values, short, first, rtol)
    if further is not None and other != short and not differ(behind, further):
        evidence = "a sequence depends on the number of its segment: segment ids are no features"
        return [Finding("segment number", evidence)]
    evidence = "a sequence depends on where in its row it lies, though no other token moves it"
    return [Finding("embedding of positions", f"{evidence}: take positions from the batch")]


def _find_amount(
    trial: Trial, values: Values, sequence: int, padded: dict[str, NDArray[Any]], rtol: float
) -> list[Finding]:
    size = int(trial.lengths[sequence])
    try:
        found = values(trial.lay([[sequence]] * trial.rows, size=size))
    except Exception:  # it takes rows of certain lengths only
        return []
    exact = {name: array[:1, :size] for name, array in found.items()}
    if not (_effect(exact, padded) > rtol).any():
        return []
    evidence = "the amount of padding moves real tokens, what stands there does not: a mean, norm "
    return [Finding("normalisation over the row", evidence + "or pooling divides by it")]


def find_in_loss(trial: Trial, pair: tuple[int, int], pools: Pools, rtol: float) -> list[Finding]:
    """Return what is wrong in a loss whose model is right, from rows of two sequences.

    The rows of a batch are all the same here, so a mean over rows is no mean of different rows.

    Args:
        trial: lays sequences out, and has the loss.
        pair: two sequences that fit into a row.
        pools: as for `change`; leaves with two values or less are taken for weights, and kept.
        rtol: relative differences above it count.
    """

    def lay(row: list[int]) -> Batch:
        return trial.lay([row] * trial.rows)

    def loss(batch: Batch) -> float:
        return trial.loss(batch)[0]

    first, second = pair
    together, length = lay([first, second]), trial.lengths[first]
    ends, begins = (np.zeros(together["segment_ids"].shape, bool) for _ in range(2))
    ends[:, length - 1] = begins[:, length] = True
    data = {name: pool for name, pool in pools.items() if len(pool) > 2}
    one, two = change(together, ends, data), change(together, begins, data)
    both, whole = change(one, begins, data), loss(together)
    allowed = 3 * rtol * abs(whole)
    found = []
    # Were it a sum over sequences, the two changes would add up.
    if not abs(whole - loss(one) - loss(two) + loss(both)) <= allowed:
        evidence = "the last token of a segment and the first of the next count together: "
        found.append(Finding("labels", evidence + "a label crosses the boundary"))
    elif not abs(whole - loss(lay([second, first]))) <= allowed:
        evidence = "the order of two segments in a row changes the loss, though no label crosses: "
        found.append(Finding("segment ids as weights", evidence + "weigh by segment_ids > 0"))
    short = first if trial.lengths[first] <= trial.lengths[second] else second
    alone, twice = lay([short]), lay([short, short])
    if not abs(loss(alone) - loss(plant(alone, "finite", pools))) <= allowed:
        evidence = "what stands in the padding changes the loss: its tokens have a weight"
        found.append(Finding("padding in the loss", evidence))
    if not found and not abs(loss(alone) - loss(twice)) <= allowed:
        evidence = "the amount of padding changes the loss: the denominator counts padding"
        found.append(Finding("denominator", evidence))
    evidence = "rows or segments count alike, whatever they hold: a mean of means; "
    rest = Finding("mean of means", evidence + "divide the sum of all by the tokens of all")
    return found or [rest]


def primitives_of(function: Callable[[Any, Any], Any], trial: Trial, batch: Batch) -> set[str]:
    """Return how a function joins tokens, by its primitives: it is traced, not run.

    Traced with a number of tokens that is no other dimension, where the function takes that.

    Returns:
        Some of `"row"` (a sum or maximum over the tokens of a row), `"square"` (an array with two
        axes of tokens: attention scores), `"steps"` (a loop over tokens, or sums that run along),
        `"loop"` (another loop) and `"half"` (numbers of 16 bits).
    """
    leaves = [*trial.floats, *jax.tree.leaves(batch)]
    taken = {size for leaf in leaves for size in leaf.shape} | {trial.rows}
    free = (n for n in range(trial.size - 1, 1, -1) if n not in taken and _is_prime(n))
    for size in (next(free, trial.size), trial.size):
        cut = jax.tree.map(lambda leaf, size=size: leaf[:, :size], batch)
        try:
            traced = jax.make_jaxpr(lambda floats, cut: function(trial.params_of(floats), cut))(
                trial.floats, cut
            )
        except Exception:  # it takes rows of certain lengths only
            continue
        found: set[str] = set()
        _walk(traced.jaxpr, size, found)
        return found
    return set()


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, number))


def _walk(jaxpr: Any, size: int, found: set[str]) -> None:
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if any(str(getattr(each.aval, "dtype", "")) in _HALF for each in equation.outvars):
            found.add("half")
        shapes = [getattr(each.aval, "shape", ()) for each in (*equation.invars, *equation.outvars)]
        if any(shape.count(size) >= 2 for shape in shapes):
            found.add("square")
        elif name.startswith("reduce_") and size in [
            shapes[0][axis] for axis in parameters["axes"]
        ]:
            found.add("row")
        elif name == "dot_general" and size in _contracted(shapes[0], parameters):
            found.add("row")
        if name in ("scan", "while") or name.startswith("cum"):
            floats = any(_is_float(each) for each in equation.outvars)
            steps = name.startswith("cum") or parameters.get("length") == size
            found |= {"steps" if steps else "loop"} if floats else set()
        for value in jax.tree.leaves(list(parameters.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                _walk(getattr(value, "jaxpr", value), size, found)


def _contracted(shape: tuple[int, ...], parameters: Any) -> list[int]:
    (axes, _), _ = parameters["dimension_numbers"]
    return [shape[axis] for axis in axes]


def _is_float(variable: Any) -> bool:
    return bool(jnp.issubdtype(getattr(variable.aval, "dtype", np.int32), jnp.floating))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
