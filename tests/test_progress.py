"""The progress bar: shown on a terminal, or when asked for; otherwise silent."""

import sys
from unittest import mock

import pytest

from seqpack_jax.feeding.progress import progress_bar


def run(show, total=1000):
    with progress_bar("counting sheep", total, show) as advance:
        advance(400)
        advance(600)


@pytest.mark.parametrize("show", [None, False])
def test_silent_when_nobody_looks(capfd, show):
    run(show)
    assert capfd.readouterr() == ("", "")


def test_rich_is_loaded_only_for_a_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    run(show=None)
    with pytest.raises(ImportError):
        run(show=True)


@pytest.mark.parametrize("show", [None, True])
def test_the_bar_says_what_how_much_and_how_fast(capfd, monkeypatch, show):
    monkeypatch.setenv("COLUMNS", "120")
    with mock.patch.object(sys.stderr, "isatty", return_value=show is None):
        run(show)
    out, err = capfd.readouterr()
    assert out == ""
    assert "counting sheep" in err
    assert "1000/1000" in err
    assert "/s" in err


def test_a_total_that_nobody_knows(capfd):
    run(show=True, total=None)
    assert "1000/?" in capfd.readouterr().err


def test_the_bar_ends_with_an_error(capfd):
    with pytest.raises(ZeroDivisionError), progress_bar("counting", 10, show=True) as advance:
        advance(3 // 0)
    assert "0/10" in capfd.readouterr().err
    run(show=True)  # another bar may be shown now
