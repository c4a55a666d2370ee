"""The notation of types, read: `parse_type` is the inverse of `str(t)` and of `t.formatted()`.

    type      = primary { "*" | "@" placement }
    primary   = tensor | label | "placement" | "<" [ field { "," field } ] ">"
              | "{" type "}" "@" placement | "(" [ type ] "->" type ")"
    field     = [ name "=" ] type
    tensor    = dtype [ "[" size { "," size } "]" ] | quoted dtype "(" "shape" "=" "None" ")"
    name      = identifier | string in the notation of Python
    size      = digits | "?"
    placement = "CLIENTS" | "SERVER"
    label     = identifier with an upper-case first letter

Spaces and line breaks may stand between any two of these.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.base_types import PLAIN_NAME, shorten
from fedjax_core.language.containers import MAX_DEPTH as MAX_DEPTH
from fedjax_core.language.dtypes import dtype_name, known_dtypes
from fedjax_core.language.placements import Placement
from fedjax_core.language.types import (
    AbstractType,
    FederatedType,
    FunctionType,
    PlacementType,
    SequenceType,
    StructType,
    TensorType,
    Type,
    is_label,
)

_WINDOW = 60

_ESCAPE = re.compile(
    r"""\\(?:([\\'"nrt])|x[0-9a-f]{2}|u[0-9a-f]{4}|U000[0-9a-f]{5}|U0010[0-9a-f]{4})"""
)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}
_TOKEN = re.compile(
    rf"""\s*(?:
      (?P<key>key<\w+>)
    | (?P<word>{PLAIN_NAME.pattern})
    | (?P<number>[0-9]+)
    | (?P<quoted>'(?:[^'\\\n]|{_ESCAPE.pattern})*'|"(?:[^"\\\n]|{_ESCAPE.pattern})*")
    | (?P<sign>->|[<>{{}}()\[\],=*@?])
    | (?P<end>\Z)
    )""",
    re.VERBOSE,
)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


def parse_type(text: str, *, dtypes: Iterable[Any] = ()) -> Type:
    """Reads a type in the notation that types print, compact or formatted.

    Args:
      text: such as `({<x=float32[?,784],y=int32>*}@CLIENTS -> float32@SERVER)`.
      dtypes: further ones to know, such as those of keys of an implementation of your own.

    Returns:
      The type `t` with `str(t)` the same text, without the spaces and line breaks that do not
      matter. The notation does not tell containers, so structs have those of `StructType`.

    Raises:
      FederatedTypeError: with the place in the text, what was expected there and what was found.

    Examples:
      >>> t = parse_type("({float32[?]}@CLIENTS -> <a=int32, b=<bool>>)")
      >>> str(t.result)
      '<a=int32,b=<bool>>'
    """
    if not isinstance(text, str):
        raise FederatedTypeError(
            f"parse_type: expected a string such as 'float32[3]', got {shorten(repr(text))} of "
            f"type {type(text).__name__}; use to_type for dtypes and pytrees of them."
        )
    further = {dtype_name(dtype): dtype for dtype in dtypes}
    return _Parser(text, {**known_dtypes(), **further}).whole()


class _Parser:
    """Recursive descent over the text, one token ahead.

    Attributes:
      text: what is read.
      dtypes: the known ones, by name.
      token: the next one.
      depth: how many types the next one stands inside of.
    """

    def __init__(self, text: str, dtypes: Mapping[str, Any]) -> None:
        self.text = text
        self.dtypes = dtypes
        self.depth = 0
        self.token = self._read(0)

    def whole(self) -> Type:
        """The type that the whole text stands for."""
        t = self._type()
        if self.token.kind != "end":
            self._fail("the end of the text, `*` or `@`")
        return t

    def _read(self, position: int) -> _Token:
        match = _TOKEN.match(self.text, position)
        if match is not None:
            kind = str(match.lastgroup)
            return _Token(kind, match[kind], match.start(kind))
        unread = self.text[position:].lstrip()  # the parser says what it expected instead
        return _Token("unknown", unread[0], len(self.text) - len(unread))

    def _next(self) -> _Token:
        token = self.token
        self.token = self._read(token.start + len(token.text))
        return token

    def _is(self, *signs: str) -> bool:
        return self.token.kind == "sign" and self.token.text in signs

    def _take(self, sign: str, expected: str | None = None) -> _Token:
        if not self._is(sign):
            self._fail(expected or f"`{sign}`")
        return self._next()

    def _fail(self, expected: str, at: _Token | None = None, hint: str = "") -> NoReturn:
        token = at or self.token
        problem = f"expected {expected}, got {_describe(token)}{hint}"
        raise FederatedTypeError(_located(problem, self.text, token))

    def _build(self, at: _Token, make: Callable[..., Type], *args: Any) -> Type:
        try:
            return make(*args)
        except FederatedTypeError as error:
            raise type(error)(_located(str(error).rstrip("."), self.text, at)) from error

    def _type(self) -> Type:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._fail(f"types at most {MAX_DEPTH} deep inside one another")
        t = self._after(self._primary())
        self.depth -= 1
        return t

    def _after(self, t: Type) -> Type:
        """`t` with the stars and placements that follow it."""
        while self._is("*", "@"):
            sign = self.token
            if self._is("*"):
                self._next()
                t = self._build(sign, SequenceType, t)
            else:
                t = self._build(sign, FederatedType, t, self._placement(), True)
        return t

    def _primary(self) -> Type:
        if self._is("<"):
            return self._struct()
        if self._is("{"):
            return self._federated()
        if self._is("("):
            return self._function()
        if self.token.kind in ("key", "word", "quoted"):
            return self._named(self._next())
        self._fail("a type")

    def _struct(self) -> Type:
        opening = self._take("<")
        fields = []
        while fields or not self._is(">"):
            fields.append(self._field())
            if not self._is(","):
                break
            self._next()
        self._take(">", "`,` or `>`")
        return self._build(opening, StructType, fields)

    def _field(self) -> tuple[str | None, Type]:
        if self.token.kind not in ("word", "quoted"):
            return None, self._type()
        first = self._next()
        if not self._is("="):
            return None, self._after(self._named(first))
        self._next()
        return _unquoted(first), self._type()

    def _federated(self) -> Type:
        opening = self._take("{")
        member = self._type()
        self._take("}")
        return self._build(opening, FederatedType, member, self._placement(), False)

    def _placement(self) -> Placement:
        self._take("@")
        if self.token.text not in Placement.__members__:
            self._fail("CLIENTS or SERVER")
        return Placement[self._next().text]

    def _function(self) -> Type:
        opening = self._take("(")
        parameter = None if self._is("->") else self._type()
        self._take("->")
        result = self._type()
        self._take(")")
        return self._build(opening, FunctionType, parameter, result)

    def _named(self, token: _Token) -> Type:
        """The type that begins with a name: a tensor, `placement` or a label."""
        name = _unquoted(token)
        is_quoted = token.kind == "quoted"
        if name in self.dtypes:
            shape = self._unknown_rank() if is_quoted else self._shape()
            return self._build(token, TensorType, self.dtypes[name], shape)
        if name == "placement" and not is_quoted:
            return PlacementType()
        if is_label(name) and not is_quoted:
            return AbstractType(name)
        known = ", ".join(sorted(self.dtypes))
        self._fail("a type", token, f", which is no dtype; the known ones are {known}")

    def _unknown_rank(self) -> None:
        for text in ("(", "shape", "=", "None", ")"):
            if self.token.text != text:
                self._fail("`(shape=None)` after a dtype in quotes, or `=` after a name in quotes")
            self._next()

    def _shape(self) -> tuple[int | None, ...]:
        if not self._is("["):
            return ()
        sizes = []
        while not sizes or self._is(","):
            self._next()
            sizes.append(self._size())
        self._take("]", "`,` or `]`")
        return tuple(sizes)

    def _size(self) -> int | None:
        if self._is("?"):
            self._next()
            return None
        # More digits than any size has, and at some length more than Python converts.
        if self.token.kind != "number" or len(self.token.text) > 19:
            self._fail("a size: `?` or an int from 0 to 2**63 - 1")
        return int(self._next().text)


def _describe(token: _Token) -> str:
    if token.kind == "end":
        return "the end of the text"
    if token.kind == "unknown" and token.text in "\"'":
        return "a quote without another one that closes a string of Python's notation"
    text = shorten(token.text, 40)
    return f"`{text}`" if text.isprintable() else repr(text)


def _unquoted(token: _Token) -> str:
    if token.kind != "quoted":
        return token.text
    return _ESCAPE.sub(_character, token.text[1:-1])


def _character(escape: re.Match[str]) -> str:
    if escape[1]:
        return _ESCAPED.get(escape[1], escape[1])
    return chr(int(escape[0][2:], 16))


def _located(problem: str, text: str, token: _Token) -> str:
    """The problem, and below it the line around the token with a caret under its beginning."""
    start = max(text.rfind("\n", 0, token.start) + 1, token.start - _WINDOW)
    end = text.find("\n", token.start)
    end = min(len(text) if end < 0 else end, token.start + _WINDOW)
    before, after = ("..." if start else ""), ("..." if end < len(text) else "")
    shown = "".join(c if c.isprintable() else " " for c in text[start:end])
    caret = " " * (len(before) + token.start - start) + "^"
    return f"parse_type: {problem}, at position {token.start}:\n  {before}{shown}{after}\n  {caret}"
