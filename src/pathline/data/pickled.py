"""The numbers in a pickled pandas frame, read without unpickling it."""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DataError


@dataclass(eq=False)
class Call:
    """What unpickling would have called; here it is only written down."""

    name: str
    arguments: Any
    state: Any = None


def read_frame(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Column names, and values (rows, columns) in double precision, of a frame of doubles.

    The opcodes are read one by one; nothing that they name is imported or called.

    Raises:
        DataError: the file can't be read, or holds no frame with a single block of doubles.
    """
    blocks: list[np.ndarray] = []
    names: list[tuple[str, ...]] = []
    try:
        with path.open("rb") as file:
            content = _described(file)
        for call in _calls(content, set()):
            if not (call.name.endswith("multiarray _reconstruct") and call.state):
                continue
            _, shape, dtype, fortran, raw = call.state
            kind = f"{dtype.state[1]}{dtype.arguments[0]}"
            if len(shape) == 2 and kind in ("<f8", ">f8"):
                values = np.frombuffer(_bytes(raw), kind).reshape(
                    shape, order="F" if fortran else "C"
                )
                blocks.append(values.astype(np.float64))
            elif len(shape) == 1 and kind == "|O8" and all(isinstance(n, str) for n in raw):
                names.append(tuple(raw))
    except (OSError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} can't be read as a pickled table: {error}") from None
    if len(blocks) == 1:
        for name in names:
            if len(name) == len(blocks[0]):
                return name, blocks[0].T
    raise DataError(f"{path} holds no pickled table with one block of doubles and its names")


def _described(file: BinaryIO) -> Any:
    """The content of a pickle as plain containers, literals and `Call`s."""
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    def take(count: int) -> list[Any]:
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "POP":
                stack.pop()
            case "MARK":
                marks.append(stack)
                stack = []
            case "GLOBAL":
                stack.append(argument)
            case "STACK_GLOBAL":
                stack.append(" ".join(take(2)))
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(take(int(opcode.name[-1]))))
            case "TUPLE":
                items = tuple(since_mark())
                stack.append(items)
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                listed = since_mark()
                stack.append(listed)
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                more = since_mark()
                stack[-1].extend(more)
            case "EMPTY_DICT":
                stack.append([])  # a list of keys and values; they need not be hashable here
            case "SETITEM":
                pair = take(2)
                stack[-1].extend(pair)
            case "SETITEMS":
                more = since_mark()
                stack[-1].extend(more)
            case "REDUCE" | "NEWOBJ":
                name, arguments = take(2)
                stack.append(Call(str(name), arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case _ if argument is not None and opcode.stack_before == []:  # a literal
                stack.append(argument)
            case name:
                raise ValueError(f"unexpected opcode {name}")
    raise ValueError("it ends too soon")


def _calls(content: Any, seen: set[int]) -> Iterator[Call]:
    """Each `Call` inside, once."""
    if id(content) in seen or not isinstance(content, Call | list | tuple):
        return
    seen.add(id(content))
    if isinstance(content, Call):
        yield content
        content = (content.arguments, content.state)
    for item in content:
        yield from _calls(item, seen)


def _bytes(raw: Any) -> bytes:
    """The bytes of an array; Python 2 wrote them as text, and `_codecs.encode` stands for both."""
    if isinstance(raw, Call):
        raw = raw.arguments[0]
    return raw if isinstance(raw, bytes) else raw.encode("latin-1")
