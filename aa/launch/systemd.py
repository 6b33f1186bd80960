"""Units by way of systemd's bus interface: start one, look at it, signal it, stop it.

The marshalling is pystemd's; its table of property signatures lacks too much, so the table is here.
"""

from __future__ import annotations

import contextlib
import enum
import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pystemd.dbusexc import DBusBaseError, DBusNoSuchUnitError
from pystemd.dbuslib import DBus, apply_signature, path_encode

Properties = Iterable[tuple[str, Any]]
"""Unit properties in order. A name may come twice: systemd adds the second value to the first."""

DESTINATION = b"org.freedesktop.systemd1"
MANAGER_PATH = b"/org/freedesktop/systemd1"
MANAGER = b"org.freedesktop.systemd1.Manager"
UNIT = b"org.freedesktop.systemd1.Unit"
SERVICE = b"org.freedesktop.systemd1.Service"
UNIT_PATH = b"/org/freedesktop/systemd1/unit"

SIGNATURES: dict[str, bytes] = {
    "AddRef": b"b",
    "AmbientCapabilities": b"t",
    "BindPaths": b"a(ssbt)",
    "BindReadOnlyPaths": b"a(ssbt)",
    "CapabilityBoundingSet": b"t",
    "CollectMode": b"s",
    "Description": b"s",
    "ExecPaths": b"as",
    "ExecStart": b"a(sasb)",
    "IgnoreSIGPIPE": b"b",
    "InaccessiblePaths": b"as",
    "KeyringMode": b"s",
    "LockPersonality": b"b",
    "MemoryMax": b"t",
    "NoExecPaths": b"as",
    "NoNewPrivileges": b"b",
    "OOMPolicy": b"s",
    "PrivateDevices": b"b",
    "PrivateIPC": b"b",
    "PrivateTmp": b"b",
    "ProtectClock": b"b",
    "ProtectControlGroups": b"b",
    "ProtectHome": b"s",
    "ProtectHostname": b"b",
    "ProtectKernelLogs": b"b",
    "ProtectKernelModules": b"b",
    "ProtectKernelTunables": b"b",
    "ProtectProc": b"s",
    "ProtectSystem": b"s",
    "ReadOnlyPaths": b"as",
    "ReadWritePaths": b"as",
    "RestrictAddressFamilies": b"(bas)",
    "RestrictNamespaces": b"t",
    "RestrictRealtime": b"b",
    "RestrictSUIDSGID": b"b",
    "SendSIGHUP": b"b",
    "Slice": b"s",
    "StandardErrorFileDescriptor": b"h",
    "StandardInputFileDescriptor": b"h",
    "StandardOutputFileDescriptor": b"h",
    "SystemCallArchitectures": b"as",
    "SystemCallErrorNumber": b"i",
    "SystemCallFilter": b"(bas)",
    "TasksMax": b"t",
    "TemporaryFileSystem": b"a(ss)",
    "TimeoutStartUSec": b"t",
    "TimeoutStopUSec": b"t",
    "Type": b"s",
    "UMask": b"u",
    "User": b"s",
}

BROKEN = (errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE, errno.ESTALE)
"""What sd-bus says when the other end of the connection is gone."""

EXITED, KILLED, DUMPED = 1, 2, 3  # CLD_EXITED and its like, as ExecMainCode has them


class SystemdError(Exception):
    """systemd refused; its own words."""


class BusBroken(SystemdError):
    """The connection to the system bus does not work."""


class NoSuchUnit(SystemdError):
    """There is no unit of that name (any more)."""


class Who(enum.StrEnum):
    """Whom a signal is for: the main process or every process of the unit's cgroup."""

    MAIN = "main"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class UnitState:
    """What systemd says of a service. `exit_code` and `signal` are of its main process, once it is over."""

    loaded: bool
    active: str  # active, activating, deactivating, inactive, failed
    result: str = "success"
    main_pid: int = 0
    cgroup: str = ""  # below the cgroup2 root, without a leading slash
    exit_code: int | None = None
    signal: int | None = None
    begun: bool = True
    """False while its start waits for its turn: such a unit is inactive, and not over."""

    @property
    def over(self) -> bool:
        return self.begun and self.active in ("inactive", "failed")


def marshalled(properties: Properties) -> list[tuple[int, Any]]:
    """Properties as sd-bus wants them: an array of structs of a name and a variant."""
    out: list[tuple[int, Any]] = [(ord("a"), b"(sv)")]
    for name, value in properties:
        signature = SIGNATURES[name]
        out += [(ord("r"), b"sv"), (ord("s"), name.encode()), (ord("v"), signature)]
        out += apply_signature(signature, [_bytes(value)])
        out += [(-1, None), (-1, None)]
    out.append((-1, None))
    return out


def _bytes(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (list, tuple)):
        return type(value)(_bytes(v) for v in value)
    return value


class Systemd:
    """The manager of this host. Calls block, for milliseconds; a broken bus connection is made anew."""

    def __init__(self) -> None:
        self._bus: DBus | None = None

    def start(self, unit: str, properties: Properties) -> None:
        """Asks for a transient unit; that it started is for `state` to tell."""
        arguments = apply_signature(b"ss", [unit.encode(), b"fail"])
        arguments += marshalled(properties)
        arguments += [(ord("a"), b"(sa(sv))"), (-1, None)]
        self._manager(b"StartTransientUnit", arguments)

    def state(self, unit: str) -> UnitState:
        path = path_encode(UNIT_PATH, unit.encode())

        def of(interface: bytes, name: bytes, signature: bytes) -> Any:
            return self._try(
                lambda bus: bus.get_property(DESTINATION, path, interface, name, signature)
            )

        if of(UNIT, b"LoadState", b"s") != b"loaded":
            return UnitState(False, "inactive")
        # In this order: what has not begun is inactive too, and what has may be over a moment
        # later; what is over has its status.
        begun = of(UNIT, b"InactiveExitTimestampMonotonic", b"t") > 0
        active = of(UNIT, b"ActiveState", b"s").decode()
        code = of(SERVICE, b"ExecMainCode", b"i")
        status = of(SERVICE, b"ExecMainStatus", b"i")
        return UnitState(
            loaded=True,
            active=active,
            result=of(SERVICE, b"Result", b"s").decode(),
            main_pid=of(SERVICE, b"MainPID", b"u"),
            cgroup=of(SERVICE, b"ControlGroup", b"s").decode().removeprefix("/"),
            exit_code=status if code == EXITED else None,
            signal=status if code in (KILLED, DUMPED) else None,
            begun=begun,
        )

    def loaded(self, pattern: str) -> list[str]:
        """The names of loaded units."""
        arguments = [(ord("a"), b"s"), (-1, None), *apply_signature(b"as", [[pattern.encode()]])]
        return [row[0].decode() for row in self._manager(b"ListUnitsByPatterns", arguments)]

    def kill(self, unit: str, who: Who, signal: int) -> None:
        self._manager(
            b"KillUnit", apply_signature(b"ssi", [unit.encode(), who.value.encode(), signal])
        )

    def stop(self, unit: str) -> None:
        self._manager(b"StopUnit", apply_signature(b"ss", [unit.encode(), b"replace"]))

    def freezer_state(self, unit: str) -> str:
        """running, freezing, frozen or thawing."""
        path = path_encode(UNIT_PATH, unit.encode())
        state: bytes = self._try(
            lambda bus: bus.get_property(DESTINATION, path, UNIT, b"FreezerState", b"s")
        )
        return state.decode()

    def freeze(self, unit: str) -> None:
        """Returns when no process of the unit runs any more, which may take long: for a thread."""
        _on_its_own(b"FreezeUnit", unit)

    def thaw(self, unit: str) -> None:
        """For a thread, as `freeze`."""
        _on_its_own(b"ThawUnit", unit)

    def forget(self, unit: str) -> None:
        """Lets systemd drop a unit that is over."""
        for method in (b"ResetFailedUnit", b"UnrefUnit"):
            with contextlib.suppress(SystemdError):
                self._manager(method, apply_signature(b"s", [unit.encode()]))

    def _manager(self, method: bytes, arguments: list[tuple[int, Any]]) -> Any:
        return self._try(
            lambda bus: bus.call_method(DESTINATION, MANAGER_PATH, MANAGER, method, arguments).body
        )

    def _try(self, call: Callable[[DBus], Any]) -> Any:
        """Calls on the open connection, and once more on a new one when that turns out to be broken."""
        if self._bus is not None:
            try:
                return _translated(call, self._bus)
            except BusBroken:
                self._bus = None
        self._bus = _connect()
        return _translated(call, self._bus)


def _connect() -> DBus:
    bus = DBus()
    try:
        bus.open()
    except (DBusBaseError, OSError) as e:
        raise BusBroken(f"cannot connect to the system bus: {e}") from e
    return bus


def _on_its_own(method: bytes, unit: str) -> None:
    """Calls the manager on a connection of this call alone: connections are not for two threads."""
    bus = _connect()
    try:
        arguments = apply_signature(b"s", [unit.encode()])
        _translated(
            lambda b: b.call_method(DESTINATION, MANAGER_PATH, MANAGER, method, arguments), bus
        )
    finally:
        bus.close()


def _translated(call: Callable[[DBus], Any], bus: DBus) -> Any:
    try:
        return call(bus)
    except DBusNoSuchUnitError as e:
        raise NoSuchUnit(_words(e)) from e
    except DBusBaseError as e:
        if abs(e.errno) in BROKEN:
            raise BusBroken(_words(e)) from e
        raise SystemdError(_words(e)) from e


def _words(error: DBusBaseError) -> str:
    message = error.err_message
    return message.decode(errors="replace") if isinstance(message, bytes) else str(message)
