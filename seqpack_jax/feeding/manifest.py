"""The format of a prepared directory: its files, and the manifest that vouches for all of them.

    manifest.json                parameters, figures, shards, checksums, a digest of itself
    counts.npy                   int64 [max_len + 1]: sequences of each length, pieces among them
    templates.npz                the plan, as `PackingPlan.save` writes it
    pools/00000.ids.npy          per shard: the ids of its sequences by length, less their base
    pools/00000.starts.npy       int64 [max_len + 2]: where those of each length start
    pools/00000.pieces.npy       int64 [p, 4]: the table of its `Pieces`, if any were cut
    pools/00000.piece_ids.npy    the numbers of its pieces by length
    pools/00000.piece_starts.npy int64 [max_len + 2]

Nothing in it depends on the machine, the time, or where input and output lie.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from seqpack_jax.errors import MAX_LENGTH, SeqpackError, check_choice, check_int, fail
from seqpack_jax.feeding.inputs import Columns
from seqpack_jax.feeding.storage import AGAIN, INT64, UINT32, FileEntry
from seqpack_jax.planning.over_length import OverLength, OverLengthReport, as_policy
from seqpack_jax.planning.plan import PackingPlan
from seqpack_jax.planning.planners import ALGORITHMS, Effort, check_effort

__all__ = ["PreparationParameters"]

FORMAT = "seqpack_jax.prepared"
VERSION = 1
MANIFEST, COUNTS, TEMPLATES, POOLS = "manifest.json", "counts.npy", "templates.npz", "pools"


class PreparationParameters(NamedTuple):
    """What `prepare` is asked for, beside its input: what the result depends on.

    Attributes:
        max_seq_len: capacity of a row in tokens.
        columns: which columns of parquet files hold lengths (or tokens) and ids.
        over_length: the policy for sequences of more tokens than that.
        extra_tokens: added to every length first, say 2 for BOS and EOS.
        algorithm: as in `pack_length_histogram`.
        max_segments: as in `pack_length_histogram`.
        tolerance: as in `pack_length_histogram`.
        budget: as in `pack_length_histogram`.
        time_limit: as in `prepare`.

    Example:
        >>> from seqpack_jax.feeding.inputs import Columns
        >>> parameters = PreparationParameters(2048, Columns(length="tokens"), extra_tokens=2)
        >>> parameters.over_length.action, parameters.algorithm
        ('error', 'best_fit_decreasing')
    """

    max_seq_len: int
    columns: Columns = Columns()
    over_length: OverLength = OverLength()
    extra_tokens: int = 0
    algorithm: str = "best_fit_decreasing"
    max_segments: int | None = None
    tolerance: int = 1
    budget: float | None = None
    time_limit: float | None = None

    def checked(self, caller: str) -> PreparationParameters:
        """Return the same as plain ints and strings; raise `SeqpackError` for what is no such."""
        max_seq_len = check_int(caller, "max_seq_len", self.max_seq_len, 1, MAX_LENGTH)
        policy = as_policy(caller, self.over_length)
        policy.check(caller, max_seq_len)
        extra = check_int(caller, "extra_tokens", self.extra_tokens, 0, MAX_LENGTH - 1)
        check_choice(caller, "algorithm", self.algorithm, ALGORITHMS)
        segments = self.max_segments
        if segments is not None:
            segments = check_int(caller, "max_segments", segments, 1)
        tolerance = check_int(caller, "tolerance", self.tolerance, 1)
        effort = check_effort(caller, self.algorithm, Effort(self.budget, self.time_limit))
        for name in ("budget", "time_limit"):
            if getattr(effort, name) == math.inf:  # which JSON does not hold
                fail(caller, f"{name} = inf, but it must be finite", "pass a larger number")
        for name, column in self.columns._asdict().items():
            if not (column is None or isinstance(column, str)):
                fail(caller, f"{name}_column = {column!r} is no name", "pass a string")
        return PreparationParameters(
            max_seq_len,
            self.columns,
            policy,
            extra,
            self.algorithm,
            segments,
            tolerance,
            effort.budget,
            effort.time_limit,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters as JSON holds them, under the names that `prepare` has for them.

        Without what only `"optimal"` takes where it is not given: directories of releases that did
        not have it keep their digests.
        """
        policy = self.over_length
        effort = {"budget": self.budget, "time_limit": self.time_limit}
        return {
            "max_seq_len": self.max_seq_len,
            **{f"{name}_column": column for name, column in self.columns._asdict().items()},
            "over_length": {
                "action": policy.action,
                "overlap": policy.overlap,
                "min_tail": policy.min_tail,
                "positions": policy.positions,
            },
            "extra_tokens": self.extra_tokens,
            "algorithm": self.algorithm,
            "max_segments": self.max_segments,
            "tolerance": self.tolerance,
            **{name: value for name, value in effort.items() if value is not None},
        }

    @classmethod
    def from_dict(cls, caller: str, saved: Any) -> PreparationParameters:
        """Return what `to_dict` returned, after checking it."""
        known = dict(saved)
        columns = Columns(*(known.pop(f"{name}_column") for name in Columns._fields))
        policy = OverLength(**known.pop("over_length"))
        return cls(columns=columns, over_length=policy, **known).checked(caller)

    def for_shards(self) -> dict[str, Any]:
        """Return those that the files of a shard depend on; the others only change the plan."""
        plan = ("algorithm", "max_segments", "tolerance", "budget", "time_limit")
        return {name: value for name, value in self.to_dict().items() if name not in plan}


def difference_of(saved: Any, asked: Mapping[str, Any]) -> str:
    """Say which parameter differs first, to end a sentence; a space if none are saved, "" if none.

    Example:
        >>> difference_of({"max_seq_len": 10}, {"max_seq_len": 12})
        ' (max_seq_len = 10, not 12)'
    """
    if not isinstance(saved, dict):  # PyPI seqpack saved other things
        return " "
    for name in dict.fromkeys([*asked, *saved]):
        one, two = saved.get(name), asked.get(name)
        if isinstance(one, dict) and isinstance(two, dict) and one != two:  # a policy
            return difference_of(one, two).replace("(", f"({name}: ")
        if one != two or (name in saved) != (name in asked):
            return f" ({name} = {one!r}, not {two!r})"
    return ""


class ShardEntry(NamedTuple):
    """What the manifest says of a shard; the rest follows from the shards before it.

    Attributes:
        input: `(name of an input file, first row, rows)` of each part of the shard.
        id_range: the lowest and the highest id in an id column; None for row numbers.
        sequences: how many ids its pools hold, those of pieces not counted.
        pieces: into how many pieces sequences were cut.
        report: what the over-length policy touched.
    """

    input: tuple[tuple[str, int, int], ...]
    id_range: tuple[int, int] | None
    sequences: int
    pieces: int
    report: OverLengthReport

    @property
    def rows(self) -> int:
        """How many rows of the input the shard is made from."""
        return sum(rows for _, _, rows in self.input)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as the manifest holds it."""
        return {**self._asdict(), "rows": self.rows, "report": report_dict(self.report)}

    @classmethod
    def from_dict(cls, action: str, saved: Any) -> ShardEntry:
        """Return what `to_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: that is something else.
        """
        parts = tuple((_text(name), _size(row), _size(rows)) for name, row, rows in saved["input"])
        if (span := saved["id_range"]) is not None:
            low, high = map(_whole, span)
            if not -(2**63) <= low <= high < 2**63:
                raise ValueError("id_range is none of int64")
            span = low, high
        counted = saved["report"]
        report = OverLengthReport(action, *(_size(counted[name]) for name in _REPORT))
        return cls(parts, span, _size(saved["sequences"]), _size(saved["pieces"]), report)


class IdCoding(NamedTuple):
    """How ids are stored: as `dtype`, less `base`."""

    base: int
    dtype: str

    @classmethod
    def of(cls, span: tuple[int, int]) -> IdCoding:
        """Return that of ids from `span[0]` to `span[1]`."""
        return cls(span[0], UINT32) if span[1] - span[0] < 2**32 else cls(0, INT64)


_REPORT = OverLengthReport._fields[1:]


def report_dict(report: OverLengthReport) -> dict[str, int]:
    """Return the counts of a report; its action is a parameter."""
    return {name: getattr(report, name) for name in _REPORT}


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no integer")
    return value


def _size(value: Any) -> int:
    if not 0 <= _whole(value) < 2**63:
        raise ValueError(f"{value} is no size")
    return _whole(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def problem_of(error: SeqpackError) -> str:
    """Return what an error says is wrong, without its caller and hint, to say it in another."""
    return str(error).partition(": ")[2].partition(". Hint:")[0]


# --- names ------------------------------------------------------------------------------------


def pool_file(shard: int, kind: str) -> str:
    """Return the name of one of the files of a shard."""
    return f"{POOLS}/{shard:05d}.{kind}.npy"


def pool_files(shards: Sequence[ShardEntry]) -> list[str]:
    """Return the names of the files of all shards."""
    names = []
    for number, shard in enumerate(shards):
        kinds = ["ids", "starts", *(("pieces", "piece_ids", "piece_starts") * bool(shard.pieces))]
        names += [pool_file(number, kind) for kind in kinds]
    return names


# --- the manifest -----------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """Return the one JSON text that is written for a value."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return the digest of a manifest: of all of it but the digest itself."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(canonical(rest).encode()).hexdigest()


def make_manifest(
    parameters: PreparationParameters,
    shards: Sequence[ShardEntry],
    files: Mapping[str, FileEntry],
    plan: PackingPlan,
) -> dict[str, Any]:
    """Return the manifest of a prepared directory.

    Args:
        parameters: what was asked for.
        shards: in the order of their rows.
        files: of all files but the manifest itself, by name.
        plan: that of all shards together.
    """
    certificate = plan.certificate
    manifest = {
        "format": FORMAT,
        "format_version": VERSION,
        "parameters": parameters.to_dict(),
        "rows": sum(shard.rows for shard in shards),
        "sequences": plan.num_sequences,
        "tokens": plan.num_tokens,
        "first_piece_id": first_piece_id(shards),
        "templates": plan.num_templates,
        "bins": plan.num_bins,
        "efficiency": plan.efficiency,
        "lower_bound": certificate.lower_bound if certificate else 0,
        "bound_method": certificate.method if certificate else "",
        "proved_optimal": certificate is not None and certificate.proved_optimal,
        "tolerance_rows": plan.tolerance_rows,
        "report": report_dict(total_report(parameters, shards)),
        "shards": [shard.to_dict() for shard in shards],
        "files": {name: entry._asdict() for name, entry in files.items()},
    }
    # As it is read back: tuples are lists in JSON.
    manifest = json.loads(canonical(manifest))
    return {**manifest, "digest": digest_of(manifest)}


def total_report(
    parameters: PreparationParameters, shards: Sequence[ShardEntry]
) -> OverLengthReport:
    """Return what the policy touched in all shards."""
    report = OverLengthReport(parameters.over_length.action)
    for shard in shards:
        report = report.plus(shard.report)
    return report


def first_piece_id(shards: Sequence[ShardEntry]) -> int:
    """Return the id of the first piece: above those of all sequences."""
    spans = [shard.id_range for shard in shards if shard.id_range is not None]
    return 1 + max(high for _, high in spans) if spans else sum(shard.rows for shard in shards)


def read_manifest(caller: str, text: str, where: str) -> dict[str, Any]:
    """Return the manifest that a text is, if it is one of this format and its digest is right.

    Raises:
        SeqpackError: it is not; `where` is the file that the error names.
    """
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(caller, f"{where} is not JSON ({error})", AGAIN)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        fail(caller, f"{where} is no manifest of a prepared directory", "pass what prepare() wrote")
    if manifest.get("format_version") != VERSION:
        version = manifest.get("format_version")
        problem = f"{where} has format version {version!r}, this release reads {VERSION}"
        fail(caller, problem, f"{AGAIN}, or update seqpack_jax")
    try:
        same = canonical(manifest) == text and digest_of(manifest) == manifest.get("digest")
    except ValueError:  # not a number
        same = False
    if not same:
        fail(caller, f"{where} was changed: its digest is not that of its contents", AGAIN)
    return manifest


def listed_files(text: str) -> set[str]:
    """Return all names in the directory of a manifest, however damaged; none if it is no such."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        return set()
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return set()
    files = manifest.get("files")
    return {MANIFEST, POOLS, *(files if isinstance(files, dict) else ())}


def parse_manifest(
    caller: str, manifest: Mapping[str, Any], where: str
) -> tuple[PreparationParameters, list[ShardEntry], dict[str, FileEntry]]:
    """Return what a manifest says of parameters, shards and files.

    Raises:
        SeqpackError: something is missing, or of another type.
    """
    try:
        parameters = PreparationParameters.from_dict(caller, manifest["parameters"])
        action = parameters.over_length.action
        shards = [ShardEntry.from_dict(action, shard) for shard in manifest["shards"]]
        files = {
            name: FileEntry(_size(file["bytes"]), _text(file["sha256"]))
            for name, file in manifest["files"].items()
        }
    except SeqpackError as error:
        fail(caller, f"{where} is damaged: {problem_of(error)}", AGAIN)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fail(caller, f"{where} is damaged ({error!r})", AGAIN)
    if problem := _disagreement(parameters, shards, files):
        fail(caller, f"{where} is damaged: {problem}", AGAIN)
    return parameters, shards, files


def _disagreement(
    parameters: PreparationParameters, shards: Sequence[ShardEntry], files: Mapping[str, FileEntry]
) -> str | None:
    """Say what in a manifest does not fit together, if anything."""
    if wrong := sorted({COUNTS, TEMPLATES, *pool_files(shards)} ^ set(files)):
        return f"{wrong[0]} is a file of shards or of files, not of both"
    by_column, action = parameters.columns.id is not None, parameters.over_length.action
    for number, shard in enumerate(shards):
        report = shard.report
        gone = report.sequences if action in ("drop", "split") else 0
        if (shard.id_range is not None) != (by_column and shard.rows > 0):
            return f"shard {number} has an id_range, or none, against the parameters"
        if shard.rows != shard.sequences + gone or shard.pieces != report.pieces:
            return f"shard {number} does not have the rows that it holds or reports"
    if first_piece_id(shards) + sum(shard.pieces for shard in shards) > 2**63:
        return "ids of pieces are above int64"
    return None
