"""Exported files: the rows of `PackedSource`, in order, whatever the workers and interruptions."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import grain
import numpy as np
import pyarrow as pa
import pytest
from filelock import FileLock
from pyarrow import parquet
from test_kill import Killed, StepCounter

import seqpack_jax as sp
from seqpack_jax.feeding import export as module
from seqpack_jax.feeding.export import export_rows
from seqpack_jax.feeding.pipeline import PackedSource
from seqpack_jax.feeding.preparation import prepare
from seqpack_jax.feeding.row_files import decode_row, writer_of
from seqpack_jax.feeding.token_store import write_flat
from seqpack_jax.planning.over_length import OverLength

CAPACITY = 16
FORMATS = ("arrayrecord", "parquet")


def lengths_of(n=60, longest=CAPACITY, seed=0):
    return np.random.default_rng(seed).integers(1, longest + 1, n)


def numbered(lengths):
    """Sequence `i` has the tokens `1000 * i`, `1000 * i + 1`, ..."""
    return [1000 * i + np.arange(n) for i, n in enumerate(lengths.tolist())]


def flat(sequences):
    return np.concatenate(sequences), [len(tokens) for tokens in sequences]


def prepared_of(folder, lengths, **options):
    np.save(folder / "lengths.npy", lengths)
    return prepare(folder / "lengths.npy", folder / "prepared", CAPACITY, **options)


def rows_of(manifest):
    """Read an export as a trainer does, with Grain alone."""
    if manifest.parameters["to"] == "arrayrecord":
        source = grain.sources.ArrayRecordDataSource(manifest.paths)
        return list(grain.MapDataset.source(source).map(decode_row))
    files = [grain.experimental.ParquetIterDataset(path) for path in manifest.paths]
    return list(grain.experimental.InterleaveIterDataset(files, cycle_length=1))


def assert_rows(found, expected):
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert sorted(one) == sorted(two)
        for name in two:
            assert one[name].dtype == two[name].dtype == np.int32
            np.testing.assert_array_equal(one[name], two[name])


def finished(output, to):
    """The files of an export that is being made."""
    return sorted(output.parent.glob(f".{output.name}.partial/*/*.{to}"))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


POLICIES = [
    ("error", CAPACITY),
    ("drop", 3 * CAPACITY),
    ("truncate", 3 * CAPACITY),
    ("truncate_left", 3 * CAPACITY),
    ("crop", 3 * CAPACITY),
    (OverLength("split"), 3 * CAPACITY),
    (OverLength("split", overlap=3, min_tail=2, positions="continue"), 3 * CAPACITY),
]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(("over_length", "longest"), POLICIES, ids=str)
def test_rows_are_those_of_packed_source(tmp_path, to, over_length, longest):
    lengths = lengths_of(longest=longest)
    sequences = numbered(lengths)
    prepared = prepared_of(tmp_path, lengths, over_length=over_length)
    manifest = export_rows(
        prepared, sequences, tmp_path / "rows", to=to, epochs=3, seed=5, rows_per_file=7
    )
    source = PackedSource(prepared.plan, prepared.pools, sequences, epochs=3, seed=5)
    assert_rows(rows_of(manifest), list(source))
    assert manifest.rows == len(source) == 3 * manifest.rows_per_epoch


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    "options",
    [{"shuffle": False}, {"pad_value": -1}, {"seed": -7}, {"rows_per_file": 1}, {"epochs": 2}],
    ids=str,
)
def test_options(tmp_path, to, options):
    lengths = lengths_of(20)
    sequences = numbered(lengths)
    prepared = prepared_of(tmp_path, lengths, tolerance=3, max_segments=2)
    manifest = export_rows(prepared, sequences, tmp_path / "rows", to=to, **options)
    options.pop("rows_per_file", None)
    source = PackedSource(prepared.plan, prepared.pools, sequences, **options)
    assert_rows(rows_of(manifest), list(source))


@pytest.mark.parametrize("to", FORMATS)
def test_blocks_need_not_fit_files(tmp_path, to, monkeypatch):
    lengths = lengths_of()
    sequences = numbered(lengths)
    prepared = prepared_of(tmp_path, lengths)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 12 * CAPACITY)
    manifest = export_rows(prepared, sequences, tmp_path / "rows", to=to, epochs=2, rows_per_file=7)
    source = PackedSource(prepared.plan, prepared.pools, sequences, epochs=2)
    assert_rows(rows_of(manifest), list(source))
    if to == "parquet":
        groups = parquet.ParquetFile(manifest.paths[0]).metadata
        sizes = [groups.row_group(k).num_rows for k in range(groups.num_row_groups)]
        assert sizes == [4, 3]


def test_files_are_named_in_training_order_and_listed(tmp_path):
    lengths = lengths_of()
    prepared = prepared_of(tmp_path, lengths)
    manifest = export_rows(
        tmp_path / "prepared", numbered(lengths), tmp_path / "rows", epochs=12, rows_per_file=2
    )
    names = [file.name for file in manifest.files]
    count = -(-prepared.plan.num_bins // 2)
    assert names == sorted(names)
    assert names[0] == f"epoch-00000-00000-of-{count:05d}.arrayrecord"
    assert names[-1] == f"epoch-00011-{count - 1:05d}-of-{count:05d}.arrayrecord"
    assert sorted(os.listdir(tmp_path / "rows")) == sorted([*names, "export.json"])
    assert sorted(os.listdir(tmp_path)) == ["lengths.npy", "prepared", "rows"]
    for file, path in zip(manifest.files, manifest.paths, strict=True):
        with open(path, "rb") as opened:
            data = opened.read()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
    saved = json.loads((tmp_path / "rows" / "export.json").read_text())
    assert saved == manifest.to_dict()
    assert saved["parameters"]["prepared"] == prepared.manifest["digest"]
    assert saved["rows"] == 12 * prepared.plan.num_bins
    assert saved["max_seq_len"] == CAPACITY


def test_parquet_has_lists_of_fixed_size(tmp_path):
    lengths = lengths_of()
    manifest = export_rows(
        prepared_of(tmp_path, lengths), numbered(lengths), tmp_path / "rows", to="parquet"
    )
    schema = parquet.read_schema(manifest.paths[0])
    assert schema.names == ["tokens", "segment_ids", "positions"]
    for field in schema:
        assert pa.types.is_fixed_size_list(field.type)
        assert (field.type.value_type, field.type.list_size) == (pa.int32(), CAPACITY)


def test_files_take_a_quarter_gigabyte(tmp_path):
    np.save(tmp_path / "lengths.npy", [2048])
    for capacity, rows in ((2048, 8192), (2**27, 1)):
        prepared = prepare(tmp_path / "lengths.npy", tmp_path / f"{capacity}", capacity)
        assert module._power_of_two(module._FILE_BYTES, prepared.plan.max_seq_len) == rows
    manifest = export_rows(tmp_path / "2048", [np.arange(2048)], tmp_path / "rows")
    assert manifest.parameters["rows_per_file"] == 8192


# Where tokens come from.


def write_tokens(path, sequences, ids=None):
    table = {"text": pa.array([tokens.tolist() for tokens in sequences], pa.list_(pa.uint32()))}
    if ids is not None:
        table["key"] = pa.array(ids)
    parquet.write_table(pa.table(table), path)


def test_sequences_by_path(tmp_path):
    lengths = lengths_of(30)
    sequences = numbered(lengths)
    (tmp_path / "in").mkdir()
    keys = np.random.default_rng(1).permutation(30) * 7 - 50
    write_tokens(tmp_path / "in" / "a.parquet", sequences[:11], keys[:11])
    write_tokens(tmp_path / "in" / "b.parquet", sequences[11:], keys[11:])
    prepare(tmp_path / "in", tmp_path / "prepared", CAPACITY, tokens_column="text", id_column="key")
    # The columns are those of the preparation.
    export_rows(tmp_path / "prepared", tmp_path / "in", tmp_path / "one")
    by_key = dict(zip(keys.tolist(), sequences, strict=True))
    export_rows(tmp_path / "prepared", by_key, tmp_path / "two")
    export_rows(
        tmp_path / "prepared",
        str(tmp_path / "in"),
        tmp_path / "three",
        tokens_column="text",
        id_column="key",
        work_dir=tmp_path / "work",
    )
    write_flat([(*flat(sequences), keys)], tmp_path / "store")
    export_rows(tmp_path / "prepared", tmp_path / "store", tmp_path / "four")
    assert len(list((tmp_path / "work").glob("tokens-*"))) == 1
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert content(tmp_path / "one") == content(tmp_path / "four")
    assert not list(tmp_path.glob(".*"))


def test_residues(tmp_path):
    (tmp_path / "a.fasta").write_text(">one\nMKV\n>two\nA\n>three\nGGGG\n")
    prepared = prepare(tmp_path / "a.fasta", tmp_path / "prepared", 8)
    manifest = export_rows(prepared, tmp_path / "a.fasta", tmp_path / "rows")
    [row] = rows_of(manifest)
    assert bytes(row["tokens"].astype(np.uint8)) == b"GGGGMKVA"


# Interruptions.


class Failing:
    """A source that breaks down at the `reads`-th read."""

    def __init__(self, sequences, reads):
        self.sequences, self.reads = sequences, reads

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise RuntimeError("the disk is gone")
        return self.sequences[index]


def known(sequences):
    """The same sequences, as a source whose fingerprint is known."""
    tokens, sizes = flat(sequences)
    return sp.FlatSequences(tokens, np.cumsum([0, *sizes]))


@contextlib.contextmanager
def stopped_after(files):
    """Let an export of one process break down after so many files."""
    write, calls = module._write_file, []

    def counted(job, task):
        if len(calls) == files:
            raise RuntimeError("the disk is gone")
        calls.append(task)
        return write(job, task)

    with (
        mock.patch.object(module, "_write_file", counted),
        pytest.raises(RuntimeError, match="the disk is gone"),
    ):
        yield


@pytest.mark.parametrize("to", FORMATS)
def test_finished_files_are_kept(tmp_path, to):
    lengths = lengths_of(200)
    sequences = known(numbered(lengths))
    prepared = prepared_of(tmp_path, lengths)
    options = {"to": to, "epochs": 2, "rows_per_file": 10}
    export_rows(prepared, sequences, tmp_path / "whole", **options)
    with stopped_after(14):
        export_rows(prepared, sequences, tmp_path / "rows", **options)
    assert not (tmp_path / "rows").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in finished(tmp_path / "rows", to)}
    total = len(list((tmp_path / "whole").glob("epoch*")))
    assert 0.3 * total < len(kept) < 0.9 * total
    manifest = export_rows(prepared, sequences, tmp_path / "rows", **options)
    for name, changed in kept.items():
        assert (tmp_path / "rows" / name).stat().st_mtime_ns == changed
    assert content(tmp_path / "rows") == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))
    assert manifest.directory == tmp_path / "rows"


def test_a_damaged_file_is_not_kept(tmp_path):
    lengths = lengths_of(100)
    sequences = known(numbered(lengths))
    prepared = prepared_of(tmp_path, lengths)
    export_rows(prepared, sequences, tmp_path / "whole", rows_per_file=10)
    with stopped_after(4):
        export_rows(prepared, sequences, tmp_path / "rows", rows_per_file=10)
    first, second, *_ = finished(tmp_path / "rows", "arrayrecord")
    data = first.read_bytes()
    first.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    [record] = tmp_path.glob(f".rows.partial/*/{second.name}.json")
    record.write_text("{")
    export_rows(prepared, sequences, tmp_path / "rows", rows_per_file=10)
    assert content(tmp_path / "rows") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"epochs": 2}, {"rows_per_file": 11}, {"shuffle": False}, {"pad_value": 3}],
    ids=str,
)
def test_other_parameters_start_anew(tmp_path, changed):
    lengths = lengths_of(100)
    sequences = known(numbered(lengths))
    prepared = prepared_of(tmp_path, lengths)
    options = {"rows_per_file": 10}
    with stopped_after(4):
        export_rows(prepared, sequences, tmp_path / "rows", **options)
    assert finished(tmp_path / "rows", "arrayrecord")
    options |= changed
    export_rows(prepared, sequences, tmp_path / "rows", **options)
    export_rows(prepared, sequences, tmp_path / "whole", **options)
    assert content(tmp_path / "rows") == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_other_tokens_start_anew(tmp_path):
    lengths = lengths_of(100)
    prepared = prepared_of(tmp_path, lengths)
    tokens, offsets = np.arange(lengths.sum()), np.cumsum([0, *lengths])
    one, two = sp.FlatSequences(tokens, offsets), sp.FlatSequences(tokens + 1, offsets)
    with stopped_after(2):
        export_rows(prepared, one, tmp_path / "rows", rows_per_file=10)
    export_rows(prepared, two, tmp_path / "rows", rows_per_file=10)
    export_rows(prepared, two, tmp_path / "whole", rows_per_file=10)
    assert content(tmp_path / "rows") == content(tmp_path / "whole")


def test_sources_without_a_fingerprint_start_anew(tmp_path):
    lengths = lengths_of(100)
    prepared = prepared_of(tmp_path, lengths)
    one, two = numbered(lengths), [tokens + 1 for tokens in numbered(lengths)]
    export_rows(prepared, two, tmp_path / "whole", rows_per_file=10)

    def dies(*given):
        raise Killed

    with (
        mock.patch.object(module.ExportPlace, "publish", dies),
        mock.patch.object(module.ExportPlace, "clear", dies),
        pytest.raises(Killed),
    ):
        export_rows(prepared, one, tmp_path / "rows", rows_per_file=10)
    assert finished(tmp_path / "rows", "arrayrecord")
    export_rows(prepared, two, tmp_path / "rows", rows_per_file=10)
    assert content(tmp_path / "rows") == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("source", [known, list])
def test_stopped_at_every_step(tmp_path, overwrite, source):
    lengths = lengths_of(24)
    sequences = source(numbered(lengths))
    prepared = prepared_of(tmp_path, lengths)
    options = {"rows_per_file": 5, "overwrite": overwrite}
    export_rows(prepared, sequences, tmp_path / "old", seed=1, **options)
    export_rows(prepared, sequences, tmp_path / "new", **options)
    old, new = content(tmp_path / "old"), content(tmp_path / "new")
    out = tmp_path / "out"

    def begin():
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(tmp_path / "old", out)

    begin()
    with StepCounter() as undisturbed:
        export_rows(prepared, sequences, out, **options)
    assert undisturbed.taken > 20
    seen = set()
    for last in range(undisturbed.taken):
        begin()
        with StepCounter(last), pytest.raises(Killed):
            export_rows(prepared, sequences, out, **options)
        found = content(out) if out.exists() else {}
        states = [("old", old), ("new", new), ("nothing", {})]
        (state,) = [name for name, files in states if found == files]
        seen.add(state)
        again = export_rows(prepared, sequences, out, **options)
        assert again.to_dict() == json.loads(new["export.json"])
        assert content(out) == new
        expected = ["lengths.npy", "new", "old", "out", "prepared"]
        assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert seen == {"nothing", "new"} | ({"old"} if overwrite else set())


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_workers_write_the_same_bytes(tmp_path, to):
    lengths = lengths_of(200)
    prepared = prepared_of(tmp_path, lengths)
    for name, workers in (("one", 1), ("two", 2)):
        export_rows(
            prepared,
            numbered(lengths),
            tmp_path / name,
            to=to,
            epochs=2,
            rows_per_file=9,
            workers=workers,
        )
    assert content(tmp_path / "one") == content(tmp_path / "two")


CHILD = """
import sys
from seqpack_jax.feeding.export import export_rows
prepared, store, output, to, workers = sys.argv[1:]
export_rows(prepared, store, output, to=to, epochs=2, rows_per_file=8, workers=int(workers))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    lengths = lengths_of(2000)
    prepared_of(tmp_path, lengths)
    write_flat([flat(numbered(lengths))], tmp_path / "store")
    options = {"epochs": 2, "rows_per_file": 8}
    whole = {}
    for to in FORMATS:
        export_rows(tmp_path / "prepared", tmp_path / "store", tmp_path / to, to=to, **options)
        whole[to] = content(tmp_path / to)
    rng = random.Random(0)
    interrupted = 0
    for attempt in range(10):
        to, workers = FORMATS[attempt % 2], 1 + attempt // 2 % 2
        output = tmp_path / f"rows-{attempt}"
        wait_for = rng.randrange(len(whole[to]) // 2)  # files, and then a part of the next one
        arguments = [tmp_path / "prepared", tmp_path / "store", output, to, workers]
        child = subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)])
        while child.poll() is None and len(finished(output, to)) < wait_for:
            time.sleep(0.001)
        time.sleep(rng.random() / 500)
        child.kill()
        assert child.wait() in (0, -signal.SIGKILL)
        if not output.exists():
            interrupted += 1
            export_rows(tmp_path / "prepared", tmp_path / "store", output, to=to, **options)
        assert content(output) == whole[to]
    assert interrupted >= 5


# Refusals.


@pytest.fixture
def made(tmp_path):
    lengths = lengths_of(20)
    return prepared_of(tmp_path, lengths), numbered(lengths), tmp_path / "rows"


def test_an_export_is_replaced_only_if_told_so(made):
    prepared, sequences, output = made
    export_rows(prepared, sequences, output)
    before = content(output)
    with pytest.raises(sp.SeqpackError, match=r"is a finished export.*overwrite=True"):
        export_rows(prepared, sequences, output, seed=1)
    assert content(output) == before
    export_rows(prepared, sequences, output, seed=1, overwrite=True)
    assert content(output) != before
    export_rows(prepared, sequences, output, overwrite=True)
    assert content(output) == before
    assert not list(output.parent.glob(".*"))


def test_other_things_are_never_replaced(made):
    prepared, sequences, output = made
    output.mkdir()
    export_rows(prepared, sequences, output)  # an empty directory will do
    (output.parent / "mine").mkdir()
    (output.parent / "mine" / "thesis.txt").touch()
    for name in ("mine", "lengths.npy"):
        with pytest.raises(sp.SeqpackError, match="choose another output"):
            export_rows(prepared, sequences, output.parent / name, overwrite=True)
    assert (output.parent / "mine" / "thesis.txt").exists()
    with pytest.raises(sp.SeqpackError, match="no local path"):
        export_rows(prepared, sequences, "gs://bucket/rows")


def test_one_process_at_a_time(made):
    prepared, sequences, output = made
    work = output.with_name(".rows.partial")
    work.mkdir()
    with (
        FileLock(work / "lock"),
        pytest.raises(sp.SeqpackError, match="another process exports to"),
    ):
        export_rows(prepared, sequences, output)
    export_rows(prepared, sequences, output)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"to": "tfrecord"}, "to = 'tfrecord' is not known.*arrayrecord, parquet"),
        ({"epochs": 0}, "epochs = 0"),
        ({"seed": 0.5}, "seed = 0.5"),
        ({"workers": 0}, "workers = 0"),
        ({"rows_per_file": 0}, "rows_per_file = 0"),
        ({"pad_value": 2**31}, "pad_value = 2147483648"),
    ],
    ids=str,
)
def test_bad_arguments_leave_nothing(made, options, problem):
    prepared, sequences, output = made
    with pytest.raises(sp.SeqpackError, match=problem):
        export_rows(prepared, sequences, output, **options)
    assert sorted(os.listdir(output.parent)) == ["lengths.npy", "prepared"]


def test_bad_tokens_are_named(made):
    prepared, sequences, output = made
    with pytest.raises(sp.SeqpackError, match=r"sequence 19 is missing"):
        export_rows(prepared, sequences[:19], output)
    longer = [*sequences[:7], np.arange(len(sequences[7]) + 2), *sequences[8:]]
    with pytest.raises(sp.SeqpackError, match=rf"sequence 7 has {len(longer[7])} tokens, but"):
        export_rows(prepared, longer, output)
    with pytest.raises(sp.SeqpackError, match=r"is no token store|does not exist"):
        export_rows(prepared, output.parent / "absent", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("to", "library", "hint"),
    [
        ("parquet", "pyarrow.parquet", r"pyarrow is not installed.*\[prepare\]"),
        ("arrayrecord", "array_record.python", r"array_record is not installed"),
        ("parquet", "filelock", r"filelock is not installed.*\[prepare\]"),
    ],
)
def test_missing_libraries_are_named(made, monkeypatch, to, library, hint):
    prepared, sequences, output = made
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(sp.SeqpackError, match=hint):
        export_rows(prepared, sequences, output, to=to)
    assert sorted(os.listdir(output.parent)) == ["lengths.npy", "prepared"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_is_an_error_with_a_hint(to):
    blocks = np.random.default_rng(0).integers(0, 2**31, (4, 64, 3, 1024), np.int32)
    hint = "No space left on device.*make room and run it again: finished files are kept"
    with pytest.raises(sp.SeqpackError, match=f"export_rows: /dev/full cannot be written .*{hint}"):
        writer_of("export_rows", to)(Path("/dev/full"), iter(blocks))


@pytest.mark.parametrize("inside", ["rows", "pools/rows"])
def test_nothing_is_put_into_a_prepared_directory(made, inside):
    prepared, sequences, output = made
    place = output.parent / "prepared"
    with pytest.raises(sp.SeqpackError, match="lies in the prepared directory"):
        export_rows(prepared, sequences, place / inside)
    sp.verify_prepared(place)


def test_parquet_needs_a_tokens_column(made):
    prepared, sequences, output = made
    write_tokens(output.parent / "a.parquet", sequences)
    hint = "no tokens column is given, and a.parquet is a parquet file.*tokens_column"
    with pytest.raises(sp.SeqpackError, match=hint):
        export_rows(prepared, output.parent / "a.parquet", output)


@pytest.mark.parametrize("record", [b"", b"1234", b"x" * 13, "text", None])
def test_what_is_no_record(record):
    with pytest.raises(sp.SeqpackError, match="decode_row: the record is a"):
        decode_row(record)


def test_decoded_rows_can_be_written_to():
    row = decode_row(np.arange(6, dtype="<i4").tobytes())
    row["tokens"][0] = 7
    assert {name: array.tolist() for name, array in row.items()} == {
        "tokens": [7, 1],
        "segment_ids": [2, 3],
        "positions": [4, 5],
    }


def test_the_same_export_again_is_a_success(made):
    prepared, sequences, output = made
    first = export_rows(prepared, sequences, output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert export_rows(prepared, sequences, output) == first
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    others = [tokens + 1 for tokens in sequences]
    with pytest.raises(sp.SeqpackError, match=r"is a finished export, of other tokens.*overwrite"):
        export_rows(prepared, others, output)
    (output / first.files[0].name).write_bytes(b"short")
    with pytest.raises(sp.SeqpackError, match=r"is a finished export.*overwrite=True"):
        export_rows(prepared, sequences, output)
    assert export_rows(prepared, sequences, output, overwrite=True) == first
    assert sorted(os.listdir(output.parent)) == ["lengths.npy", "prepared", "rows"]


def test_files_of_others_are_never_removed(made):
    prepared, sequences, output = made
    export_rows(prepared, sequences, output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(sp.SeqpackError, match=r"holds notes\.txt, which is no file of the export"):
        export_rows(prepared, sequences, output, overwrite=True)
    (output / "notes.txt").unlink()
    for text in ("{}", "no JSON", '{"files": [{"name": "notes.txt"}]}'):
        (output / "export.json").write_text(text)
        with pytest.raises(sp.SeqpackError, match="is no export"):
            export_rows(prepared, sequences, output, overwrite=True)
    assert len(os.listdir(output)) == 2


def test_nothing_is_left_of_a_run_that_finished_no_file(made):
    prepared, sequences, output = made
    with pytest.raises(RuntimeError, match="the disk is gone"):
        export_rows(prepared, Failing(sequences, 3), output)
    with stopped_after(0):
        export_rows(prepared, known(sequences), output)
    assert sorted(os.listdir(output.parent)) == ["lengths.npy", "prepared"]


@pytest.mark.parametrize("to", FORMATS)
def test_an_empty_data_set(tmp_path, to):
    prepared = prepared_of(tmp_path, np.zeros(0, np.int64))
    for _ in range(2):
        manifest = export_rows(prepared, [], tmp_path / "rows", to=to, epochs=2)
        assert (manifest.rows, manifest.files, manifest.paths) == (0, (), [])
        assert os.listdir(tmp_path / "rows") == ["export.json"]
    assert not list(tmp_path.glob(".*"))


def test_links_and_home(made, monkeypatch):
    prepared, sequences, output = made
    behind = output.parent / "behind"
    output.symlink_to(behind)
    for seed in (0, 1):
        manifest = export_rows(prepared, sequences, output, seed=seed, overwrite=True)
        assert manifest.directory == behind
        assert output.is_symlink()
    monkeypatch.setenv("HOME", str(output.parent))
    monkeypatch.chdir(output.parent)
    export_rows(prepared, sequences, "~/mine")
    assert (output.parent / "mine" / "export.json").exists()
    assert not (output.parent / "~").exists()


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("/", "cannot be replaced"),
        ("", "output = '' is not a path"),
        (None, "output = None is not a path"),
        (b"rows", "output = b'rows' is not a path"),
        ("a\0b", "is not a path"),
        ("n" * 250, "cannot be made"),
        ("lengths.npy/rows", "Not a directory"),
        ("/proc/no/rows", "cannot be made"),
    ],
)
def test_odd_outputs(made, monkeypatch, output, problem):
    prepared, sequences, folder = made
    monkeypatch.chdir(folder.parent)
    with pytest.raises(sp.SeqpackError, match=f"export_rows: .*{problem}"):
        export_rows(prepared, sequences, output)
    assert sorted(os.listdir(folder.parent)) == ["lengths.npy", "prepared"]


def test_what_is_not_prepared_and_where_no_store_can_be(made):
    _, sequences, output = made
    with pytest.raises(sp.SeqpackError, match="prepared is a int"):
        export_rows(3, sequences, output)
    write_tokens(output.parent / "a.parquet", sequences)
    prepared = prepare(output.parent / "a.parquet", output.parent / "p", 16, tokens_column="text")
    with pytest.raises(sp.SeqpackError, match=r"lengths\.npy cannot be made"):
        export_rows(
            prepared, output.parent / "a.parquet", output, work_dir=output.parent / "lengths.npy"
        )
    assert sorted(os.listdir(output.parent)) == ["a.parquet", "lengths.npy", "p", "prepared"]


# Sequences that are found by row number.


def test_files_must_be_those_that_were_prepared(tmp_path):
    sequences = numbered(np.full(10, 3))
    for name in ("in", "more", "fewer"):
        (tmp_path / name).mkdir()
        write_tokens(tmp_path / name / "b.parquet", sequences)
    prepared = prepare(tmp_path / "in", tmp_path / "prepared", CAPACITY, tokens_column="text")
    write_tokens(tmp_path / "more" / "a.parquet", sequences)
    write_tokens(tmp_path / "fewer" / "b.parquet", sequences[:9])
    for name, problem in (
        ("more", r"of a\.parquet, none were prepared, but the sequences have 10 rows"),
        ("fewer", r"of b\.parquet, 10 rows were prepared, but the sequences have 9 rows"),
    ):
        with pytest.raises(sp.SeqpackError, match=problem):
            export_rows(prepared, tmp_path / name, tmp_path / "rows")
    assert not list(tmp_path.glob(".*"))
    export_rows(prepared, [tmp_path / "in" / "b.parquet"], tmp_path / "one")
    export_rows(prepared, sequences, tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    write_flat([flat(sequences * 2)], tmp_path / "store")
    with pytest.raises(sp.SeqpackError, match=r"10 sequences were prepared, but the .* has 20"):
        export_rows(prepared, tmp_path / "store", tmp_path / "rows")


def test_of_lengths_in_another_format_rows_are_counted(tmp_path):
    sequences = numbered(np.full(10, 3))
    prepared = prepared_of(tmp_path, np.full(10, 3))
    for name, rows in (("a", 6), ("b", 4)):
        write_tokens(tmp_path / f"{name}.parquet", sequences[:rows])
    both = [tmp_path / "a.parquet", str(tmp_path / "b.parquet")]
    export_rows(prepared, both, tmp_path / "rows", tokens_column="text")
    with pytest.raises(sp.SeqpackError, match="10 rows were prepared, but the sequences have 6"):
        export_rows(prepared, both[:1], tmp_path / "other", tokens_column="text")


def test_extra_tokens_are_in_no_file(tmp_path):
    sequences = numbered(np.full(10, 3))
    write_tokens(tmp_path / "a.parquet", sequences)
    prepared = prepare(
        tmp_path / "a.parquet", tmp_path / "p", CAPACITY, tokens_column="text", extra_tokens=2
    )
    with pytest.raises(sp.SeqpackError, match=r"2 extra tokens, which no file has.*object whose"):
        export_rows(prepared, tmp_path / "a.parquet", tmp_path / "rows")
    assert sorted(os.listdir(tmp_path)) == ["a.parquet", "p"]
    write_flat([flat([np.r_[1, tokens, 2] for tokens in sequences])], tmp_path / "store")
    export_rows(prepared, tmp_path / "store", tmp_path / "rows")
