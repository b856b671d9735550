"""Read and rewrite pickles without running them: no name that a pickle mentions is ever imported or called.

The metadata of a `torch_dist` checkpoint is a pickle, and so are the arguments inside it. Here every class,
function or constant that a pickle names becomes an `Inert` stand-in of that name, which only remembers how it
was made; `dumps` writes the same names back. That makes reading safe, fast (importing torch alone takes
longer than most commands here) and independent of the versions of torch and Megatron, whose classes need not
exist on this machine.

Contract: `loads` refuses names that its caller does not expect, so that what it reads can be passed on;
containers, numbers and strings become themselves; `loads(dumps(x))` has the structure of `x`, and the real
`pickle` builds from `dumps(loads(b))` what it builds from `b`. Tensor storages stay outside, as the
persistent ids that `torch.save` writes.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PROTOCOL = 2
"""What torch.save writes, and the newest whose memo indices are explicit: `dumps` adds entries of its own."""

_CONTAINERS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,  # the names of protocol 2
    ("__builtin__", "frozenset"): frozenset,
}


class Inert:
    """Stand-in for an instance of the class, or for the result of the function, that a pickle names.

    Attributes set by the pickle are attributes here. `arguments` are those of the call that made it.
    """

    __slots__ = ("__dict__", "_state", "arguments", "called")
    global_name: tuple[str, str]

    def __new__(cls, *arguments: Any) -> Inert:
        self = super().__new__(cls)
        self.arguments, self.called, self._state = arguments, False, None
        return self

    def __init__(self, *arguments: Any) -> None:
        self.called = True  # a pickle that makes an instance without calling its class does not come here

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
            state = self.__dict__
        self._state = state

    def __reduce__(self) -> Any:
        if self.called:
            return type(self), self.arguments, self._state
        return copyreg.__newobj__, (type(self), *self.arguments), self._state  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"<{'.'.join(self.global_name)} {self.arguments or ''}{self.__dict__ or ''}>"


@dataclass(frozen=True)
class Storage:
    """A tensor's bytes, which `torch.save` keeps outside the pickle: its persistent id."""

    id: tuple[Any, ...]


def inert_class(module: str, name: str) -> type[Inert]:
    """The stand-in class of that name. A new one each time: keep it where many instances share it."""
    return type(name, (Inert,), {"__slots__": (), "global_name": (module, name)})


def name_of(value: Any) -> str | None:
    """`torch.float32` for the stand-in of that name; None for anything that is no stand-in class."""
    return ".".join(value.global_name) if isinstance(value, type) and issubclass(value, Inert) else None


def loads(data: bytes, accept: Iterable[str] = ()) -> Any:
    """The value of a pickle, with stand-ins for whatever it names.

    `accept` holds full names (`torch.Size`), and packages or modules whose names are all accepted (`numpy`).
    Raises pickle.UnpicklingError for any other name, and for damaged bytes.
    """
    return loads_parts(data, 1, accept)[0]


def loads_parts(data: bytes, number: int, accept: Iterable[str] = ()) -> list[Any]:
    """The values of `number` pickles that follow each other at the start of `data`; otherwise as `loads`."""
    file = io.BytesIO(data)
    try:
        return [_Unpickler(file, tuple(accept)).load() for _ in range(number)]
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes can fail anywhere in the machine that runs them
        raise pickle.UnpicklingError(f"not a readable pickle: {error}") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, accept: tuple[str, ...]) -> None:
        super().__init__(file)
        self._accept = accept
        self._classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        container = _CONTAINERS.get((module, name))
        if container is not None:
            return container
        full = f"{module}.{name}"
        if not any(full == accepted or full.startswith(accepted + ".") for accepted in self._accept):
            raise pickle.UnpicklingError(f"it names {full}, which has no business there")
        if (module, name) not in self._classes:
            self._classes[module, name] = inert_class(module, name)
        return self._classes[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        return Storage(pid)


def dumps(value: Any) -> bytes:
    """Pickle of a value that `loads` returned, changed or not."""
    for base in range(0x6D747064, 0x7FFF0000, 0x10000):
        pickler = _Pickler(io.BytesIO(), base)
        pickler.dump(value)
        data = pickler.file.getvalue()
        marks = {mark: data.count(mark) for mark in map(pickler.mark, range(len(pickler.names)))}
        if list(marks.values()) == pickler.uses:  # else the marks also occur by chance: take others
            return _name_globals(data, pickler, len(pickler.memo.copy()))
    raise AssertionError("every mark occurs in the pickle")


class _Pickler(pickle.Pickler):
    """Writes marks instead of stand-in classes: the C pickler would insist on importing what they name."""

    def __init__(self, file: io.BytesIO, base: int) -> None:
        super().__init__(file, protocol=PROTOCOL)
        self.file, self._base = file, base
        self.names: dict[tuple[str, str], int] = {}
        self.uses: list[int] = []

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            return obj.id
        if isinstance(obj, type) and issubclass(obj, Inert):
            number = self.names.setdefault(obj.global_name, len(self.names))
            if number == len(self.uses):
                self.uses.append(0)
            self.uses[number] += 1
            return self._base + number
        return None

    def mark(self, number: int) -> bytes:
        """What the pickler writes for it: the integer, then the order to look up the object of that id."""
        return pickle.BININT + struct.pack("<i", self._base + number) + pickle.BINPERSID


def _name_globals(data: bytes, pickler: _Pickler, memo_size: int) -> bytes:
    """Replace the first mark of each name by the name, kept in the memo, all others by a look at the memo."""
    for (module, name), number in pickler.names.items():
        index = struct.pack("<I", memo_size + number)
        written = pickle.GLOBAL + f"{module}\n{name}\n".encode() + pickle.LONG_BINPUT + index
        mark = pickler.mark(number)
        data = data.replace(mark, written, 1).replace(mark, pickle.LONG_BINGET + index)
    return data
