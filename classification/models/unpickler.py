"""Interpret pickles without Python's unpickler: a pickle can only create values and call a few given functions."""

import struct
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import IO, Any

from .stand_ins import DamagedFileError, Function, Name, StandIn, check_key

MAX_VALUES = 1_000_000  # opcodes of a pickle
MAX_BITS = 1024  # of integers
_MAX_NAME = 256  # characters in the name of a module, type or function
_COPIED = (str, bytes, list, tuple, dict, set)  # arguments that a function may copy


class Unpickler:
    """Reads consecutive pickles of protocols 2 to 5 from a file.

    Args:
        file: read up to the end of each pickle.
        size: bytes in the file; memory and time are at most proportional to it.
        find: returns the ``Function`` or ``Name`` for the full name of a type or function.
        refer: returns the value for a persistent reference.
    """

    def __init__(self, file: IO[bytes], size: int, find: Callable[[str], Any], refer: Callable[[Any], Any]) -> None:
        self._file, self._left, self._budget = file, size, 4 * size + 100_000
        self._find, self._refer = find, refer

    def load(self) -> Any:
        """The value of the next pickle. Containers in it may be shared or contain themselves.

        Raises:
            DamagedFileError, ForeignTypeError, and any other exception: for a pickle that is damaged or forged.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        for _ in range(MAX_VALUES):
            code = self._read(1)
            if code == b".":
                return self._stack.pop()
            if code not in _OPCODES:
                raise DamagedFileError(f"its pickle has the opcode {code!r}")
            method, argument = _OPCODES[code]
            method(self, argument)
        raise DamagedFileError(f"its pickle has more than {MAX_VALUES:,} values")

    def _read(self, count: int) -> bytes:
        content = self._file.read(count) if 0 <= count <= self._left else b""
        if len(content) != count:
            raise DamagedFileError("it is truncated")
        self._left -= count
        return content

    def _read_number(self, form: struct.Struct) -> Any:
        return form.unpack(self._read(form.size))[0]

    def _read_name(self) -> str:
        line = self._file.readline(_MAX_NAME)
        if not line.endswith(b"\n"):
            raise DamagedFileError("a name in its pickle is too long")
        self._left -= len(line)
        return line[:-1].decode()

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _charge(self, values: Any) -> None:
        """Count the values that a call may copy, since a pickle could pass the same long value to many calls."""
        self._budget -= sum(len(value) for value in values if type(value) in _COPIED)
        if self._budget < 0:
            raise DamagedFileError("its pickle copies values too often")

    # The effects of the opcodes. Each method takes the argument given in the table below.

    def _skip(self, count: int) -> None:
        self._read(count)

    def _mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _push_new(self, kind: Callable[[], Any]) -> None:
        self._stack.append(kind())

    def _push_number(self, form: struct.Struct) -> None:
        self._stack.append(self._read_number(form))

    def _push_integer(self, form: struct.Struct) -> None:
        count = self._read_number(form)
        if 8 * count > MAX_BITS:
            raise DamagedFileError(f"it has an integer of more than {MAX_BITS} bits")
        self._stack.append(int.from_bytes(self._read(count), "little", signed=True))

    def _push_bytes(self, form: struct.Struct) -> None:
        self._stack.append(self._read(self._read_number(form)))

    def _push_text(self, form: struct.Struct) -> None:
        self._stack.append(self._read(self._read_number(form)).decode("utf-8", "surrogatepass"))

    def _push_tuple(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        if len(values) != count:
            raise DamagedFileError("its pickle is incomplete")
        self._stack[-count:] = [values]

    def _push_long_tuple(self, _: None) -> None:
        values = tuple(self._since_mark())
        self._stack.append(values)

    def _put(self, form: struct.Struct | None) -> None:
        self._memo[self._read_number(form) if form else len(self._memo)] = self._stack[-1]

    def _get(self, form: struct.Struct) -> None:
        self._stack.append(self._memo[self._read_number(form)])

    def _append(self, many: bool) -> None:
        values = self._since_mark() if many else [self._stack.pop()]
        self._last(list).extend(values)

    def _add(self, _: None) -> None:
        values = self._since_mark()
        for value in values:
            check_key(value)
        self._last(set).update(values)

    def _set_items(self, many: bool) -> None:
        values = self._since_mark() if many else [self._stack.pop(-2), self._stack.pop()]
        target = self._last(dict, OrderedDict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            check_key(key)
            target[key] = value

    def _last(self, *kinds: type) -> Any:
        if type(self._stack[-1]) not in kinds:
            raise DamagedFileError(f"its pickle adds to a value of type {type(self._stack[-1]).__name__}")
        return self._stack[-1]

    def _name(self, _: None) -> None:
        module, name = self._read_name(), self._read_name()
        self._stack.append(self._find(f"{module}.{name}"))

    def _name_on_stack(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > _MAX_NAME:
            raise DamagedFileError("a name in its pickle is wrong")
        self._stack.append(self._find(f"{module}.{name}"))

    def _call(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple or type(function) not in (Function, Name):
            raise DamagedFileError("its pickle calls a value that is not a function")
        self._charge((arguments, *arguments))
        self._stack.append(function(*arguments))

    def _build(self, _: None) -> None:
        state, value = self._stack.pop(), self._stack[-1]
        if type(value) is OrderedDict:
            if type(state) is dict and "_metadata" in state:  # versions of modules
                value._metadata = state["_metadata"]  # type: ignore[attr-defined]
            return
        parts = state.values() if type(state) is dict else state if type(state) is tuple else ()
        self._charge((state, *parts))
        if type(value) is SimpleNamespace:
            vars(value).update(**state)
        elif isinstance(value, StandIn):
            value.build(state)
        else:
            raise DamagedFileError("its pickle changes a value that has no state")

    def _reference(self, _: None) -> None:
        self._stack.append(self._refer(self._stack.pop()))


_BYTE, _SHORT, _INT, _UNSIGNED, _LONG, _FLOAT = map(struct.Struct, ("<B", "<H", "<i", "<I", "<Q", ">d"))
# Opcodes that torch.save writes: the method and its argument, with the name in pickletools. STOP ends a pickle.
_OPCODES: dict[bytes, tuple[Callable[[Unpickler, Any], None], Any]] = {
    b"\x80": (Unpickler._skip, 1),  # PROTO
    b"\x95": (Unpickler._skip, 8),  # FRAME
    b"(": (Unpickler._mark, None),  # MARK
    b"N": (Unpickler._push, None),  # NONE
    b"\x88": (Unpickler._push, True),  # NEWTRUE
    b"\x89": (Unpickler._push, False),  # NEWFALSE
    b"}": (Unpickler._push_new, dict),  # EMPTY_DICT
    b"]": (Unpickler._push_new, list),  # EMPTY_LIST
    b")": (Unpickler._push, ()),  # EMPTY_TUPLE
    b"\x8f": (Unpickler._push_new, set),  # EMPTY_SET
    b"K": (Unpickler._push_number, _BYTE),  # BININT1
    b"M": (Unpickler._push_number, _SHORT),  # BININT2
    b"J": (Unpickler._push_number, _INT),  # BININT
    b"G": (Unpickler._push_number, _FLOAT),  # BINFLOAT
    b"\x8a": (Unpickler._push_integer, _BYTE),  # LONG1
    b"\x8b": (Unpickler._push_integer, _INT),  # LONG4
    b"\x8c": (Unpickler._push_text, _BYTE),  # SHORT_BINUNICODE
    b"X": (Unpickler._push_text, _UNSIGNED),  # BINUNICODE
    b"\x8d": (Unpickler._push_text, _LONG),  # BINUNICODE8
    b"U": (Unpickler._push_text, _BYTE),  # SHORT_BINSTRING, of Python 2
    b"T": (Unpickler._push_text, _INT),  # BINSTRING, of Python 2
    b"C": (Unpickler._push_bytes, _BYTE),  # SHORT_BINBYTES
    b"B": (Unpickler._push_bytes, _UNSIGNED),  # BINBYTES
    b"\x8e": (Unpickler._push_bytes, _LONG),  # BINBYTES8
    b"\x96": (Unpickler._push_bytes, _LONG),  # BYTEARRAY8
    b"\x85": (Unpickler._push_tuple, 1),  # TUPLE1
    b"\x86": (Unpickler._push_tuple, 2),  # TUPLE2
    b"\x87": (Unpickler._push_tuple, 3),  # TUPLE3
    b"t": (Unpickler._push_long_tuple, None),  # TUPLE
    b"q": (Unpickler._put, _BYTE),  # BINPUT
    b"r": (Unpickler._put, _UNSIGNED),  # LONG_BINPUT
    b"\x94": (Unpickler._put, None),  # MEMOIZE
    b"h": (Unpickler._get, _BYTE),  # BINGET
    b"j": (Unpickler._get, _UNSIGNED),  # LONG_BINGET
    b"a": (Unpickler._append, False),  # APPEND
    b"e": (Unpickler._append, True),  # APPENDS
    b"\x90": (Unpickler._add, None),  # ADDITEMS
    b"s": (Unpickler._set_items, False),  # SETITEM
    b"u": (Unpickler._set_items, True),  # SETITEMS
    b"c": (Unpickler._name, None),  # GLOBAL
    b"\x93": (Unpickler._name_on_stack, None),  # STACK_GLOBAL
    b"R": (Unpickler._call, None),  # REDUCE
    b"\x81": (Unpickler._call, None),  # NEWOBJ
    b"b": (Unpickler._build, None),  # BUILD
    b"Q": (Unpickler._reference, None),  # BINPERSID
}
