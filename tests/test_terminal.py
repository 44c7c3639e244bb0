"""Progress goes to stderr, as asked or where someone looks."""

import sys
from unittest import mock

import pytest

from seqpack_jax.terminal import is_shown, stderr_console


@pytest.mark.parametrize("terminal", [False, True])
def test_it_is_shown_as_asked_or_on_a_terminal(terminal):
    with mock.patch.object(sys.stderr, "isatty", return_value=terminal):
        assert is_shown(None) == terminal
        assert is_shown(True)
        assert not is_shown(False)


def test_a_notebook_gets_it_on_stderr_too(capfd, monkeypatch):
    """Not as a widget, which needs a package of its own and warns without it."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    console = stderr_console()
    console.print("half")
    assert not console.is_jupyter
    assert capfd.readouterr() == ("", "half\n")
