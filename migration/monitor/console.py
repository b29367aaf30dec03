"""HMP on this process's own terminal or pipe (``--monitor stdio``)."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
from pathlib import Path

from .context import Monitor
from .hmp import HMP
from .version import package

PROMPT = "(postcopy) "
HISTORY_LINES_MAX = 1000


def history_file() -> Path:
    """Where the terminal's history is kept (XDG base directories)."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "postcopy" / "monitor-history"


class StdioConsole:
    """A console in a thread of its own, until end of input or :meth:`close`.

    On a terminal: editing, history and completion by readline. On a pipe: lines in, text out. End
    of input ends the console, not the VM.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._hmp = HMP(monitor)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._is_prompting = False
        self._is_closed = False
        self._attributes = termios.tcgetattr(0) if self._is_terminal else None
        target = self._serve_terminal if self._is_terminal else self._serve_pipe
        self._thread = threading.Thread(target=target, name="console", daemon=True)

    def start(self) -> None:
        """Show the banner and read."""
        with contextlib.suppress(BrokenPipeError):
            print(f"{package()} monitor - type 'help' for more information", flush=True)
        self._thread.start()

    def notify(self, text: str) -> None:
        """Show a line without disturbing what is being typed. Any thread."""
        if self._is_terminal and self._is_prompting:
            import readline

            typed = readline.get_line_buffer()
            sys.stdout.write(f"\r\x1b[K{text}\n{PROMPT}{typed}")
        else:
            sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def close(self) -> None:
        """Stop reading and put the terminal back as it was.

        The thread of a terminal console may still sleep in readline; it is a daemon.
        """
        if self._is_closed:
            return
        self._is_closed = True
        os.write(self._wake_write, b"x")
        if not self._is_terminal and self._thread.is_alive():
            self._thread.join(1.0)
        if self._is_terminal or not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)
        if self._attributes is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, self._attributes)
            self._save_history()
            print(flush=True)

    def _execute(self, line: str) -> None:
        text = self._hmp.execute(line, may_wait=True).replace("\r\n", "\n")
        sys.stdout.write(text)
        sys.stdout.flush()
        if self._hmp.after_reply is not None:
            self._hmp.after_reply()

    # -- a pipe ---------------------------------------------------------------------------------

    def _serve_pipe(self) -> None:
        """Until nobody writes, or nobody reads, any more; the VM goes on."""
        with contextlib.suppress(BrokenPipeError):
            self._serve_lines()

    def _serve_lines(self) -> None:
        """Reads descriptor 0 itself: a thread inside ``sys.stdin`` cannot be woken at the end."""
        partial = b""
        self._prompt()
        while True:
            ready, _, _ = select.select([0, self._wake_read], [], [])
            if self._wake_read in ready:
                return
            data = os.read(0, 4 << 10)
            if not data:
                return
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                self._execute(line.decode("utf-8", "replace"))
                self._prompt()

    def _prompt(self) -> None:
        sys.stdout.write(PROMPT)
        sys.stdout.flush()

    # -- a terminal -----------------------------------------------------------------------------

    def _serve_terminal(self) -> None:
        self._set_up_readline()
        while not self._is_closed:
            self._is_prompting = True
            try:
                line = input(PROMPT)
            except EOFError:
                print("(console closed, the VM goes on; Ctrl-C ends it)", flush=True)
                return
            finally:
                self._is_prompting = False
            self._execute(line)

    def _set_up_readline(self) -> None:
        import readline

        with contextlib.suppress(OSError):
            readline.read_history_file(history_file())
        readline.set_history_length(HISTORY_LINES_MAX)
        readline.set_completer_delims(" ")
        readline.set_completer(self._completer)
        readline.parse_and_bind("tab: complete")

    def _completer(self, _text: str, index: int) -> str | None:
        import readline

        line = readline.get_line_buffer()[: readline.get_endidx()]
        found = self._hmp.complete(line)
        if len(found) == 1 and not found[0].endswith(":"):
            found = [found[0] + " "]  # a whole word: go on with the next (URIs go on themselves)
        return found[index] if index < len(found) else None

    def _save_history(self) -> None:
        import readline

        with contextlib.suppress(OSError):
            path = history_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
