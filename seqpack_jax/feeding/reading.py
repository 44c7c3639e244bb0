"""Reading the records of a batch, many at once, and what is put around each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import check_int, fail
from seqpack_jax.feeding.features import Features
from seqpack_jax.planning.histogram import Int64

__all__ = ["NO_ENDS", "Ends", "make_ends", "read_records"]

_MISSING = "pass the sequences planned"


def read_records(caller: str, sequences: Any, ids: Int64, threads: int = 1) -> list[Any]:
    """Return the records of `ids`, as the source gives them.

    Ids should be sorted, which is the order of storage in most sources, and come once.  A source
    with `__getitems__` (those of PyTorch, Hugging Face and ArrayRecord have it) gets all of them in
    one call.  Lists, tuples and arrays are indexed; others are read by several threads at once.

    Time: a read per id.

    Args:
        caller: the public function that an error shall name.
        sequences: has `[id]`, and perhaps `__getitems__(ids)`.
        ids: int64 `[k]`.
        threads: how many read at once; 1 for none but this one.

    Raises:
        SeqpackError: a sequence is missing, or is no array; another exception of the source gets a
            note that names the sequence.

    Example:
        >>> read_records("docs", ["a", "b", "c"], np.array([0, 2]))
        ['a', 'c']
    """
    in_memory = isinstance(sequences, list | tuple | np.ndarray)
    if isinstance(sequences, Sequence | np.ndarray) and int(ids.min(initial=0)) < 0:
        problem = f"sequence {ids[ids < 0][0]} is missing: an id is at least 0"
        fail(caller, problem, _MISSING)
    wanted = ids.tolist()
    if not wanted:  # an empty row; not every source likes to be asked for nothing
        return []
    at_once = getattr(sequences, "__getitems__", None)
    if at_once is not None:
        try:
            records = list(at_once(wanted))
        except Exception as error:
            _read_each(caller, sequences, wanted)  # names the sequence, if it is one's fault
            error.add_note(f"{caller}: while __getitems__ of {len(wanted)} ids was called")
            raise
        if len(records) != len(wanted):
            problem = f"__getitems__ of {len(wanted)} ids returned {len(records)} records"
            fail(caller, problem, "return one record per id")
        return records
    if in_memory or threads == 1 or len(wanted) < 2:
        return _read_each(caller, sequences, wanted)
    size = -(-len(wanted) // threads)
    parts = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    with ThreadPoolExecutor(len(parts)) as pool:
        read = pool.map(lambda part: _read_each(caller, sequences, part), parts)
        return [record for part in read for record in part]


def _read_each(caller: str, sequences: Any, ids: list[int]) -> list[Any]:
    records = []
    for index in ids:
        try:
            records.append(sequences[index])
        except (IndexError, KeyError) as error:
            fail(caller, f"sequence {index} is missing ({error!r})", _MISSING)
        except Exception as error:
            error.add_note(f"{caller}: while sequence {index} was read")
            raise
    return records


class Ends(NamedTuple):
    """Tokens that are put around each sequence.

    Attributes:
        bos: the token before the first, by feature with a capacity.
        eos: the token behind the last.

    Example:
        >>> from seqpack_jax.feeding.features import make_features
        >>> features = make_features("docs", 8)
        >>> make_ends("docs", features, 1, None).around("docs", features, {"tokens": np.arange(2)})
        {'tokens': array([1, 0, 1])}
    """

    bos: dict[str, int]
    eos: dict[str, int]

    def extra(self, features: Features) -> tuple[int, ...]:
        """Return how many tokens are added, of each capacity."""
        return tuple((name in self.bos) + (name in self.eos) for name in features.capacities)

    def around(
        self, caller: str, features: Features, record: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """Return a record with the tokens around it.

        Features that share the rows of the tokens get their pad value there.
        """
        found = dict(record)
        for name, array in record.items():
            lead = name if name in features.capacities else features.names[0]
            if features.is_metadata(name, array) or not (lead in self.bos or lead in self.eos):
                continue
            pad = features.pad_value.get(name, 0)
            ends = [
                np.full((int(lead in side), *array.shape[1:]), side.get(name, pad))
                for side in (self.bos, self.eos)
            ]
            dtype = array.dtype
            if name in features.capacities:
                if not array.size:  # nothing has no dtype: np.array([])
                    array, dtype = array.astype(np.int64), np.dtype(np.int64)
                if array.ndim != 1 or dtype.kind not in "iu":
                    problem = f"feature {name!r} has shape {array.shape} and dtype {dtype}"
                    fail(caller, problem, "bos_id and eos_id go around 1-D arrays of integers")
                largest = max(side.get(name, 0) for side in (self.bos, self.eos))
                dtype = np.result_type(dtype, np.min_scalar_type(largest))
            found[name] = np.concatenate([ends[0], array, ends[1]], dtype=dtype, casting="unsafe")
        return found


NO_ENDS = Ends({}, {})


def make_ends(caller: str, features: Features, bos_id: Any, eos_id: Any) -> Ends:
    """Check the tokens that go around sequences: None, an int, or `{feature: int}` for each."""
    sides = []
    for argument, given in (("bos_id", bos_id), ("eos_id", eos_id)):
        by_name = {} if given is None else given
        if not isinstance(by_name, Mapping):
            by_name = dict.fromkeys(features.capacities, given)
        for name, token in by_name.items():
            if name not in features.capacities:
                problem = f"{argument} names a feature {name!r}"
                fail(caller, problem, f"features with a capacity are {', '.join(features.names)}")
            check_int(caller, argument, token, 0, 2**31 - 1)
        sides.append({name: int(token) for name, token in by_name.items()})
    return Ends(*sides)
