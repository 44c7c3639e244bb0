"""The one error class of the library, and the argument checks that every module shares.

Bad input is refused before any work is done.  A message names the caller, what is wrong (with the
first offending index, its value, the limit, and how many more there are) and ends with a hint.
"""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_LENGTH",
    "MAX_TOTAL",
    "OVER_LENGTH_HINT",
    "SeqpackError",
    "check_choice",
    "check_int",
    "check_integers",
    "check_lengths",
    "check_number",
    "check_offsets",
    "fail",
]

MAX_LENGTH = 2**31 - 1  # tokens: templates hold lengths as int32
MAX_TOTAL = 2**62  # tokens or sequences: their sums must stay inside int64
OVER_LENGTH_HINT = "pass over_length='drop', 'truncate', 'crop' or 'split', or raise max_seq_len"


class SeqpackError(ValueError):
    """Raised for every bad argument or damaged input; a `ValueError`.

    Example:
        >>> import seqpack_jax as sp
        >>> try:
        ...     sp.pack_sequences([300, 700, 20], max_seq_len=512)
        ... except sp.SeqpackError as error:
        ...     print(error)
        pack_sequences: lengths[1] = 700, but max_seq_len is 512 (1 of 3 lengths is over it).
        Hint: pass over_length='drop', 'truncate', 'crop' or 'split', or raise max_seq_len.
    """


def fail(caller: str, problem: str, hint: str) -> NoReturn:
    """Raise the `SeqpackError` of `caller`: one sentence on the problem, one on the remedy."""
    raise SeqpackError(f"{caller}: {problem}. Hint: {hint}.")


def check_int(
    caller: str, name: str, value: Any, low: int | None = None, high: int | None = None
) -> int:
    """Return `value` as a Python int, if it is an integer in `[low, high]`."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        fail(caller, f"{name} = {value!r} is not an integer", f"pass {name} as an int")
    if (low is not None and number < low) or (high is not None and number > high):
        limit = f"at least {low}" if high is None else f"in [{low}, {high}]"
        fail(caller, f"{name} = {number}, but it must be {limit}", f"check what computes {name}")
    return number


def check_number(caller: str, name: str, value: Any) -> float:
    """Return `value` as a float, if it is a number above 0."""
    try:
        if isinstance(value, bool | np.bool_ | str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        fail(caller, f"{name} = {value!r} is not a number", f"pass {name} as a float")
    if not number > 0:
        fail(caller, f"{name} = {value!r}, but it must be above 0", f"check what computes {name}")
    return number


def check_choice(caller: str, name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return `value`, if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        fail(caller, f"{name} = {value!r} is not known", f"choose one of {', '.join(choices)}")
    return value


def check_integers(caller: str, name: str, values: Any) -> NDArray[Any]:
    """Return `values` as a 1-D array of an integer dtype (empty input becomes int64)."""
    hint = f"pass {name} as a 1-D array of integers"
    if np.ma.is_masked(values):
        fail(caller, f"{name} has masked entries", f"leave them out of {name} first")
    try:
        array = np.asarray(values)
    except ValueError:
        fail(caller, f"{name} is ragged", hint)
    if array.ndim != 1:
        fail(caller, f"{name} has shape {array.shape}", hint)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            index = int(np.argmin(np.isfinite(array)))
            fail(caller, f"{name}[{index}] = {array[index]} is not an integer", hint)
        fail(caller, f"{name} has dtype {array.dtype}, not an integer dtype", hint)
    return array


def check_lengths(
    caller: str,
    lengths: Any,
    max_seq_len: int | None = None,
    *,
    name: str = "lengths",
    hint: str = OVER_LENGTH_HINT,
) -> NDArray[Any]:
    """Return `lengths` as a 1-D integer array whose values lie in `[1, max_seq_len]`.

    Time: O(n), two passes without a copy.
    """
    array = check_integers(caller, name, lengths)
    if array.size == 0:
        return array
    if int(array.min()) < 1:
        below = array < 1
        index = int(below.argmax())
        fail(
            caller,
            f"{name}[{index}] = {array[index]}, but a length is at least 1 "
            f"({_share(int(np.count_nonzero(below)), array.size)} below it)",
            "remove empty sequences before planning",
        )
    limit, what = max_seq_len, "max_seq_len is"
    if limit is None:
        limit, what, hint = MAX_LENGTH, "a length is at most", "check what computes lengths"
    if int(array.max()) > limit:
        over = array > limit
        index = int(over.argmax())
        fail(
            caller,
            f"{name}[{index}] = {array[index]}, but {what} {limit} "
            f"({_share(int(np.count_nonzero(over)), array.size)} over it)",
            hint,
        )
    return array


def check_offsets(caller: str, offsets: NDArray[Any], size: int, count: int, hint: str) -> None:
    """Raise unless `offsets` cut `size` entries into `count` parts, none of them empty."""
    whole = len(offsets) == count + 1 and offsets[0] == 0 and offsets[-1] == size
    if not whole or (offsets[1:] <= offsets[:-1]).any():
        fail(caller, f"offsets do not cut {size} entries into {count} non-empty parts", hint)


def _share(count: int, total: int) -> str:
    return f"{count} of {total} lengths {'is' if count == 1 else 'are'}"
