"""Write input files, list and read them, and expect errors: what tests of inputs share."""

import contextlib
import os
import re
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from seqpack_jax.errors import SeqpackError
from seqpack_jax.feeding.inputs import Columns, list_shards, read_shard

LENGTH = Columns(length="length")
TOKENS = Columns(tokens="tokens")


def list_in(source, columns=LENGTH, **options):
    return list_shards(source, columns, caller="test", **options)


def blocks_of(source, columns=LENGTH, **options):
    return [block for s in list_in(source, columns, **options) for block in read_shard(s, columns)]


def lengths_in(source, columns=LENGTH, **options):
    return [n for lengths, _ in blocks_of(source, columns, **options) for n in lengths.tolist()]


def names_in(source, columns=LENGTH, **options):
    return [part.name for shard in list_in(source, columns, **options) for part in shard.parts]


def write(path, rows=(1, 2, 3), row_group_size=None, kind=None, **columns):
    """Write a parquet file with a column of lengths, and others."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    table = pa.table({"length": pa.array(rows, kind or pa.int32()), **columns})
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


def text_of(path, content):
    Path(path).write_bytes(content)
    return str(path)


def empty_memory():
    """The file system in memory, emptied."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    return fs


@contextlib.contextmanager
def refused(*words, caller="test"):
    """Assert that the block raises an error of `caller` with these words, in order, and a hint."""
    with pytest.raises(SeqpackError) as caught:
        yield caught
    text = str(caught.value)
    assert re.match(rf"(?s){caller}: \S.*\. Hint: \S.*\.$", text), text
    place = 0
    for word in words:
        assert word in text[place:], text
        place = text.index(word, place) + len(word)
