"""`prepare` killed at any moment: nothing half done loads, and a new run makes the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
from prepared_directories import content, prepare_in_shards, write_lengths

import seqpack_jax as sp
from seqpack_jax.planning.over_length import OverLength

STEPS = ("mkdir", "rename", "replace", "rmdir", "unlink")  # of `os`: what changes directories


class Killed(BaseException):
    pass


class StepCounter:
    """Counts the steps that a run takes, and ends it, and all that it would do then, at one."""

    def __init__(self, last=None):
        self.taken, self.last, self.stack = 0, last, ExitStack()

    def __enter__(self):
        for name in STEPS:
            self.stack.enter_context(mock.patch.object(os, name, self.counted(getattr(os, name))))
        return self

    def __exit__(self, *error):
        self.stack.close()

    def counted(self, function):
        def call(*args, **kwargs):
            if self.taken == self.last:
                raise Killed
            self.taken += 1
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("overwrite", [False, True])
def test_stopped_at_every_step(overwrite, tmp_path):
    lengths = np.random.default_rng(0).integers(1, 30, 40)
    source = write_lengths(tmp_path / "in", lengths)
    options = {"max_rows": 20, "over_length": OverLength("split"), "overwrite": overwrite}
    prepare_in_shards(source, tmp_path / "old", 20, **options)
    prepare_in_shards(source, tmp_path / "new", 16, **options)
    old, new = content(tmp_path / "old"), content(tmp_path / "new")
    out = tmp_path / "out"

    def begin():
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(tmp_path / "old", out)

    begin()
    with StepCounter() as undisturbed:
        prepare_in_shards(source, out, 16, **options)
    assert undisturbed.taken > 20
    seen = set()
    for last in range(undisturbed.taken):
        begin()
        with StepCounter(last), pytest.raises(Killed):
            prepare_in_shards(source, out, 16, **options)
        states = [("old", old), ("new", new), ("nothing", {})]
        (state,) = [name for name, files in states if content(out) == files]
        seen.add(state)
        assert not out.exists() or sp.verify_prepared(out)
        prepare_in_shards(source, out, 16, **options)
        assert content(out) == new
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "new", "old", "out"]
    assert seen == {"nothing", "new"} | ({"old"} if overwrite else set())


# The command as users run it, but for small shards, so that kills fall into every stage.
PROGRAM = """
import sys
from functools import partial
from seqpack_jax.cli import main
from seqpack_jax.feeding import preparation
if __name__ == "__main__":
    preparation.list_shards = partial(preparation.list_shards, max_rows=10_000)
    sys.exit(main(sys.argv[1:]))
"""


def start(source, output, workers):
    argv = f"prepare --input {source} --length-column length --id-column key --max-seq-len 256"
    argv = f"{argv} --over-length split --workers {workers} --output {output}"
    script = output.parent / "program.py"
    script.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, script, *argv.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    lengths = np.minimum(np.random.default_rng(0).lognormal(4, 1, 200_000) + 1, 2000).astype(int)
    source = write_lengths(tmp_path / "in", lengths, lengths.cumsum())
    began = time.monotonic()
    finish(start(source, tmp_path / "undisturbed", workers=2))
    duration = time.monotonic() - began
    expected = content(tmp_path / "undisturbed")
    digest = sp.load_prepared(tmp_path / "undisturbed").manifest["digest"]
    rng, out = random.Random(0), tmp_path / "out"
    kills = kept = 0
    while kills < 10:
        process = start(source, out, workers=2)
        try:
            process.wait(rng.uniform(0.2, 1.0) * duration)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # it alone: its workers are orphans now
        process.communicate(timeout=30)  # all that hold its stderr, the orphans too, have ended
        kills += process.returncode == -signal.SIGKILL
        records = list(tmp_path.glob(".out.partial/records/*.json"))
        kept = max(kept, len(records))
        try:
            assert sp.load_prepared(out).manifest["digest"] == digest
        except sp.SeqpackError:
            assert not out.exists()
        else:  # from the beginning again
            assert content(out) == expected
            shutil.rmtree(out)
    finish(start(source, out, workers=1))
    assert content(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in",
        "out",
        "program.py",
        "undisturbed",
    ]
    assert kept > 0  # some kills came after a shard was done
