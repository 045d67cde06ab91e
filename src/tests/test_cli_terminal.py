"""The terminal's echo, on a pseudo-terminal."""

from __future__ import annotations

import io
import os
import sys

import pytest

from lyra_emergence.cli.terminal import silent_keys

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals on Windows")


def echoes(descriptor: int) -> bool:
    import termios

    return bool(termios.tcgetattr(descriptor)[3] & termios.ECHO)


def test_keys_are_silent_within_the_block_and_kept_for_after_it() -> None:
    import pty

    master, slave = pty.openpty()
    with os.fdopen(slave) as terminal, os.fdopen(master, "wb", buffering=0) as keyboard:
        assert echoes(slave)
        with silent_keys(terminal):
            assert not echoes(slave)
            keyboard.write(b"typed ahead\n")
        assert echoes(slave)
        assert terminal.readline() == "typed ahead\n"


def test_the_echo_comes_back_after_an_error() -> None:
    import pty

    master, slave = pty.openpty()
    with os.fdopen(slave) as terminal, os.fdopen(master, "wb", buffering=0):
        with pytest.raises(KeyboardInterrupt), silent_keys(terminal):
            raise KeyboardInterrupt
        assert echoes(slave)


def test_without_a_terminal_nothing_happens() -> None:
    with silent_keys(io.StringIO("a line\n")) as nothing:
        assert nothing is None
