"""The example trains on through SIGKILL, to the very bits of a run that nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "notebooks" / "train_and_resume.py"
STEPS, EVERY = 40, 4


def start(folder, workers=0):
    command = [sys.executable, str(EXAMPLE), "--folder", str(folder), "--workers", str(workers)]
    command += ["--steps", str(STEPS), "--every", str(EVERY)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, JAX_PLATFORMS="cpu", TMPDIR=str(folder.parent)),
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output.splitlines()


def kill_after(process, step, temporary):
    """Kill a run while it is past a step; return its lines, and what it had in `temporary`."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith(f"step {step} "):
            time.sleep(random.Random(step).uniform(0, 0.05))
            break
    found = list(temporary.glob("seqpack_jax-*"))
    os.kill(process.pid, signal.SIGKILL)  # it alone: its workers are orphans now
    process.communicate(timeout=60)  # all that hold its output, the orphans too, have ended
    assert process.returncode == -signal.SIGKILL
    return lines, found


def result_in(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_bits(tmp_path):
    undisturbed = start(tmp_path / "undisturbed")
    rng = random.Random(4)
    folder, reached = tmp_path / "killed", 0
    for workers in (1, 0):
        process = start(folder, workers)
        # The second save waits until the first one is complete.
        step = rng.randrange(reached + 2 * EVERY + 1, reached + 3 * EVERY + 3)
        lines, parcels = kill_after(process, step, tmp_path)
        assert len(parcels) == workers
        begun = int(lines[0].removeprefix("begin after step "))
        assert begun % EVERY == 0
        assert (begun > 0) == (reached > 0)
        assert begun <= reached
        assert not list(tmp_path.glob("seqpack_jax-*"))  # its workers cleaned up
        reached = step
        assert not (folder / "result.json").exists()
    lines = finish(start(folder))
    begun = int(lines[0].removeprefix("begin after step "))
    assert 0 < begun <= reached
    expected = finish(undisturbed)
    assert expected[0] == "begin after step 0"
    assert lines[1:] == expected[1 + begun :]  # the losses, and the result
    assert result_in(folder) == result_in(tmp_path / "undisturbed")
