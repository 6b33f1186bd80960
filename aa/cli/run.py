"""`aasm run`: the client side of a run: its terminal or pipes, its signals, its exit code."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import selectors
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import click

from aa.cli.errors import Failure
from aa.paths import LAUNCH_SOCKET, RUN_GATEWAY_SOCKET
from aa.varlink import Client, VarlinkError
from aa.varlink.codec import ProtocolError

LAUNCH = "io.agentassembly.Launch"

CANNOT_RUN = 125
SIGNALLED = 128

REATTACH_SECONDS = 30.0
"""How long a restarted aa-launch may be away before a run that goes on is given up."""
REATTACH_STEP = 0.1
SIGNAL_SECONDS = 5.0
DRAIN_SECONDS = 1.0
"""For what a run wrote last, after its end."""
CHUNK = 65536
PENDING_INPUT = 65536
"""Bytes typed or pasted that the run has not read yet; then reading stops."""
SHARED_TERMINAL_SECONDS = 0.2
"""Before looking again whether another program of the pipeline still has the terminal."""

FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
END_OF_FILE = b"\x04"

Event = dict[str, Any] | Exception


class Terminal:
    """A pseudo terminal for the streams that are terminals here, and what passes between the two.

    `raw` means that keys go through as they are. That needs this terminal for input and output;
    otherwise (a pipeline) it stays as it is, and lines and signals are forwarded.
    """

    def __init__(self) -> None:
        here = [os.isatty(fd) for fd in range(3)]
        self.raw = here[0] and here[1]
        self._input = 0 if here[0] else None
        self._outer = next(fd for fd in (1, 2, 0) if here[fd])
        self._saved: list[Any] | None = None
        self._pending = b""
        self.master, self.slave = os.openpty()
        os.set_blocking(self.master, False)
        attributes = termios.tcgetattr(self._outer)
        if not self.raw:
            attributes[1] &= ~termios.OPOST  # the outer terminal does it
            attributes[3] &= ~termios.ECHO
        termios.tcsetattr(self.slave, termios.TCSANOW, attributes)
        self.resize()
        self.streams = [self.slave if terminal else fd for fd, terminal in enumerate(here)]

    def resize(self) -> None:
        """Hands on the size of the window. The kernel tells the run by SIGWINCH."""
        with contextlib.suppress(OSError):
            size = fcntl.ioctl(self._outer, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def foreground(self) -> bool:
        """Whether this process may read the terminal and change its settings without being stopped."""
        try:
            return os.tcgetpgrp(self._outer) == os.getpgrp()
        except OSError:
            return False

    def enter(self) -> None:
        """Takes the terminal, if it is ours to take."""
        if self.raw and self._saved is None and self.foreground():
            self._saved = termios.tcgetattr(0)
            tty.setraw(0, termios.TCSADRAIN)

    def leave(self) -> None:
        """Gives the terminal back as it was."""
        if self._saved is not None:
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(0, termios.TCSADRAIN, self._saved)
            self._saved = None

    def wants_input(self) -> bool:
        return self._input is not None and len(self._pending) < PENDING_INPUT and self.foreground()

    def shared(self) -> bool:
        """Whether another program of the pipeline, a pager say, has the terminal for itself."""
        if self.raw:
            return False
        try:
            return not termios.tcgetattr(0)[3] & termios.ICANON
        except (termios.error, OSError):
            return True

    def read_input(self) -> None:
        try:
            data = os.read(0, CHUNK)
        except OSError:  # the terminal is gone
            self._input = None
            return
        self._pending += data or END_OF_FILE
        self.write_pending()

    def write_pending(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._pending = self._pending[os.write(self.master, self._pending) :]

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    def copy_output(self) -> bool:
        """Copies what the run wrote; False when nothing can come any more."""
        try:
            data = os.read(self.master, CHUNK)
        except BlockingIOError:
            return True
        except OSError:  # EIO: the run has closed every descriptor of it
            return False
        return bool(data) and _write_all(self._outer, data)

    def drain(self) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        with selectors.DefaultSelector() as ready:
            ready.register(self.master, selectors.EVENT_READ)
            while time.monotonic() < deadline and ready.select(0.05):
                if not self.copy_output():
                    return


def _write_all(fd: int, data: bytes) -> bool:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # somebody made the terminal non-blocking for all of us
            time.sleep(0.01)
        except OSError:
            return False
    return True


@dataclass
class Followed:
    """The run's life as aa-launch tells it, read by a thread of its own."""

    parameters: dict[str, Any]
    descriptors: list[int]
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    run: str = ""

    def begin(self, wake: Callable[[], None]) -> None:
        threading.Thread(target=self._follow, args=(wake,), daemon=True).start()

    def _follow(self, wake: Callable[[], None]) -> None:
        try:
            for event in self._told():
                self.run = event["run"]
                self.events.put(event)
                wake()
        except Exception as e:  # it goes to the main thread, which says it
            self.events.put(e)
            wake()

    def _told(self) -> Iterator[dict[str, Any]]:
        with Client(LAUNCH_SOCKET) as client:
            client.set_timeout(None)
            try:
                yield from client.stream(f"{LAUNCH}.Start", self.parameters, fds=self.descriptors)
                return
            except (OSError, ProtocolError):
                if not self.run:
                    raise
        yield from self._wait()

    def _wait(self) -> Iterator[dict[str, Any]]:
        """aa-launch was restarted; the run goes on, and the new one tells of its end."""
        deadline = time.monotonic() + REATTACH_SECONDS
        while True:
            try:
                with Client(LAUNCH_SOCKET) as client:
                    client.set_timeout(None)
                    yield from client.stream(f"{LAUNCH}.Wait", {"run": self.run})
                    return
            except FileNotFoundError:  # its socket outlives a restart: the package is gone
                raise
            except (OSError, ProtocolError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(REATTACH_STEP)


class Session:
    """One run from the side of the person: pumps its terminal, forwards signals, waits for its end."""

    def __init__(self, followed: Followed, terminal: Terminal | None) -> None:
        self._followed = followed
        self._terminal = terminal
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._end: dict[str, Any] | None = None

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def pump(self) -> dict[str, Any]:
        """Runs until the end of the run and returns what aa-launch says of it."""
        with self._handlers():
            if self._terminal is not None:
                self._terminal.enter()
            try:
                self._followed.begin(self.wake)
                while self._end is None:
                    self._step()
                if self._terminal is not None:
                    self._terminal.drain()
                return self._end
            finally:
                if self._terminal is not None:
                    self._terminal.leave()

    def _step(self) -> None:
        t = self._terminal
        timeout = None
        with selectors.DefaultSelector() as ready:
            ready.register(self._wake_read, selectors.EVENT_READ)
            if t is not None:
                if t.master >= 0:
                    write = selectors.EVENT_WRITE if t.pending else 0
                    ready.register(t.master, selectors.EVENT_READ | write)
                if t.wants_input():
                    if t.shared():
                        timeout = SHARED_TERMINAL_SECONDS
                    else:
                        ready.register(0, selectors.EVENT_READ)
            for key, mask in ready.select(timeout):
                if key.fd == self._wake_read:
                    self._take_news()
                elif t is not None and key.fd == 0:
                    if not t.shared():
                        t.read_input()
                elif t is not None:
                    if mask & selectors.EVENT_WRITE:
                        t.write_pending()
                    if mask & selectors.EVENT_READ and not t.copy_output():
                        time.sleep(0.02)  # nobody has it open: before the start, or at the end

    def _take_news(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, CHUNK)
        while not self._signals.empty():
            self._take_signal(self._signals.get())
        while not self._followed.events.empty():
            event = self._followed.events.get()
            if isinstance(event, Exception):
                raise event
            self._say(event["notes"])
            if event["event"] == "exited":
                self._end = event

    def _say(self, notes: list[str]) -> None:
        for note in notes:
            raw = self._terminal is not None and self._terminal.raw
            sys.stderr.write(f"aasm run: {note}" + ("\r\n" if raw else "\n"))
        sys.stderr.flush()

    # Signals

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        numbers = [*FORWARDED, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH]
        before = {number: signal.signal(number, self._note_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.put(number)
        self.wake()

    def _take_signal(self, number: int) -> None:
        t = self._terminal
        raw = t is not None and t.raw
        match number:
            case signal.SIGWINCH:
                if t is not None:
                    t.resize()
            case signal.SIGTSTP:
                self._stop(raw)
            case signal.SIGCONT:
                if t is not None:
                    t.enter()
                    t.resize()
            case signal.SIGHUP if t is not None:
                # The terminal is gone. aa-launch hangs up the run when this connection closes.
                raise HungUp
            case _:
                self._forward(number)

    def _stop(self, raw: bool) -> None:
        """Stops as a job does: this process, and the run where the keys are not its own."""
        if self._terminal is not None:
            self._terminal.leave()
        if not raw:
            self._forward(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if not raw:
            self._forward(signal.SIGCONT)

    def _forward(self, number: int) -> None:
        if not self._followed.run:  # not started yet: to give up is all that can be meant
            raise GaveUp(number)
        with contextlib.suppress(OSError, VarlinkError, ProtocolError):
            with Client(LAUNCH_SOCKET, timeout=SIGNAL_SECONDS) as client:
                client.call(f"{LAUNCH}.Signal", {"run": self._followed.run, "signal": number})


class HungUp(Exception):
    """The terminal is gone."""


class GaveUp(Exception):
    """A signal came before the program ran."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


def exit_code_of(end: dict[str, Any]) -> int:
    """The run's own exit code as a shell counts."""
    if end["exit_code"] is not None:
        return int(end["exit_code"])
    return CANNOT_RUN if end["signal"] is None else SIGNALLED + int(end["signal"])


def texts(arguments: tuple[str, ...]) -> list[str]:
    try:
        for argument in arguments:
            argument.encode()
    except UnicodeEncodeError:
        raise Failure(
            "an argument is not UTF-8 text", hint="hand it over in a file", code=CANNOT_RUN
        ) from None
    return list(arguments)


def environment() -> list[str]:
    """This process's variables. aa-launch passes on the few that a run may have."""
    found = (f"{name}={value}" for name, value in os.environ.items())
    return [text for text in found if _is_text(text)]


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_streams() -> None:
    """A stream that is closed becomes /dev/null, or the next descriptor would take its place."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)


def run_agent(agent: str | None, user: str | None, argv: list[str]) -> int:
    """Starts a run and returns its exit code. Raises `Failure` when there was none."""
    open_streams()
    terminal = Terminal() if any(os.isatty(fd) for fd in range(3)) else None
    streams = terminal.streams if terminal is not None else [0, 1, 2]
    try:
        directory = os.open(".", os.O_PATH | os.O_DIRECTORY)
    except OSError as e:
        raise Failure(f"the working directory: {e.strerror}", code=CANNOT_RUN) from e
    parameters = {
        "agent": agent,
        "user": user,
        "argv": argv,
        "environment": environment(),
        "terminal": terminal is not None,
        "stdin": 0,
        "stdout": 1,
        "stderr": 2,
        "directory": 3,
    }
    session = Session(Followed(parameters, [*streams, directory]), terminal)
    try:
        end = session.pump()
    except (HungUp, GaveUp) as e:
        return SIGNALLED + (e.number if isinstance(e, GaveUp) else signal.SIGHUP)
    except (OSError, VarlinkError, ProtocolError) as e:
        raise failure(e) from e
    if end["reason"]:
        click.echo(f"aasm run: {end['reason']}", err=True)
    return exit_code_of(end)


def failure(error: Exception) -> Failure:
    """What went wrong before or beside the program, with what to do about it."""
    if isinstance(error, VarlinkError):
        if error.name == "NotStarted":
            component = error.parameters.get("component", "launch")
            return Failure(
                f"the run did not start: {component}: {error.parameters.get('reason')}",
                hint="nothing was executed; `aasm status` shows the layers",
                code=CANNOT_RUN,
            )
        return Failure(str(error.parameters.get("reason") or error), code=CANNOT_RUN)
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        if RUN_GATEWAY_SOCKET.exists():
            return Failure("a run cannot start another run", code=CANNOT_RUN)
        return Failure(
            f"nobody listens on {LAUNCH_SOCKET}",
            hint="is it running? `systemctl status aa-launch.socket`",
            code=CANNOT_RUN,
        )
    if isinstance(error, ConnectionResetError):
        return Failure(
            "aa-launch went away", hint="see `journalctl -u aa-launch -n 20`", code=CANNOT_RUN
        )
    return Failure(f"aa-launch: {error}", code=CANNOT_RUN)


@click.command(
    "run",
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  aasm run -- claude
  aasm run --agent claude-code -- claude -p 'fix the tests'
  aasm run --user agent1 -- ./build.sh < input > output

Exit codes: those of the command; 128+N when signal N ended it; 125 when the run did
not start, 126 when the command cannot be executed, 127 when it is not found.""",
)
@click.option("--agent", metavar="NAME", help="The agent this is. Default: the one that is "
              "declared under the command's name, else `default`.")  # fmt: skip
@click.option("--user", metavar="USER", help="The user to run as. Default: you.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run_command(
    ctx: click.Context, agent: str | None, user: str | None, command: tuple[str, ...]
) -> None:
    """Start COMMAND as a governed run of an agent.

    It runs in this folder with this terminal or these pipes, in a sandbox, and only once
    every layer of its agent has confirmed that it is guarded.
    """
    ctx.exit(run_agent(agent, user, texts(command)))
