"""Dataclasses from the tables of a TOML file: every key checked, every error with its path."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Callable, Iterator, Mapping
from operator import ge, gt, le
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import InputError

T = TypeVar("T")
LIMITS: dict[str, Callable[[Any, Any], bool]] = {"at_least": ge, "at_most": le, "above": gt}
SPOKEN = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def option(default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A field with limits: at_least, at_most, above (of each number), or one_of (of a string)."""
    return dataclasses.field(default=default, metadata=limits)


def build(kind: type[T], table: Mapping[str, Any], path: str = "") -> T:
    """The dataclass of a table; fields that are dataclasses are tables in it.

    Types of fields: bool, int, float, str, dataclasses, tuples of one type (of a list, or of one
    value alone, where the length is free), and unions. Raises InputError, with the path of the key,
    for a key that is not known (and the nearest that is), that is missing, or whose value is of
    another type or beyond the limits of option().
    """
    hints, values = get_type_hints(kind), {}
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise InputError(f"{path}{key}: no such key{_nearest(key, fields, path)}")
    for name, field in fields.items():
        where, hint = path + name, hints[name]
        if dataclasses.is_dataclass(hint):
            child = table.get(name, {})
            if not isinstance(child, Mapping):
                raise InputError(f"{where} must be a table, not {child!r:.60}")
            values[name] = build(hint, child, f"{where}.")  # type: ignore[arg-type]
        elif name in table:
            values[name] = _value(table[name], hint, where)
            _check_limits(values[name], field.metadata, where)
        elif field.default is dataclasses.MISSING:
            raise InputError(f"{where} is missing: {_spoken(hint)}")
    return kind(**values)


def _nearest(key: str, fields: Mapping[str, Any], path: str) -> str:
    close = difflib.get_close_matches(key, fields, 1)
    if close:
        return f"; did you mean {path}{close[0]}?"
    return f" (known: {', '.join(path + name for name in fields)})"


def _value(value: Any, hint: Any, where: str) -> Any:
    """The value as the type says. Raises InputError where it is none."""
    for member in _members(hint):
        if get_origin(member) is tuple:
            kinds = get_args(member)
            is_free = kinds[1:] == (...,)
            many = [value] if is_free and not isinstance(value, list) else value
            if isinstance(many, list) and (is_free or len(many) == len(kinds)):
                fitting = [_fits(x, kinds[0]) for x in many]
                if all(fitting):
                    return tuple(kinds[0](x) for x in many)
        elif _fits(value, member):
            return member(value)
    raise InputError(f"{where} must be {_spoken(hint)}, not {json_of(value)}")


def _members(hint: Any) -> list[Any]:
    is_union = get_origin(hint) in (Union, types.UnionType)
    return [m for m in get_args(hint) if m is not type(None)] if is_union else [hint]


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and abs(value) < 2**63 and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    return type(value) is kind


def _spoken(hint: Any) -> str:
    names = []
    for member in _members(hint):
        kinds = get_args(member)
        if not kinds:
            names.append(SPOKEN[member])
        elif kinds[1:] == (...,):
            names.append(f"{SPOKEN[kinds[0]]} or a list of them")
        else:
            names.append(f"a list of {len(kinds)} numbers")
    return " or ".join(names)


def _check_limits(value: Any, limits: Mapping[str, Any], where: str) -> None:
    for one in value if isinstance(value, tuple) else [value]:
        if isinstance(one, str):
            if any("\ud800" <= char <= "\udfff" for char in one):
                raise InputError(f"{where} must be Unicode, not {one!r:.60}")
            allowed = limits.get("one_of")
            if allowed is not None and one not in allowed:
                raise InputError(f"{where} must be one of {', '.join(allowed)}, not {one!r:.60}")
            continue
        for limit, is_within in LIMITS.items():
            if limit in limits and not is_within(one, limits[limit]):
                words = f"{limit.replace('_', ' ')} {limits[limit]}"
                raise InputError(f"{where} must be {words}, not {one}")


def flat(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(key with its path, value) of every field, tables taken apart."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{path}{field.name}.")
        else:
            yield path + field.name, value


def to_toml(settings: Any) -> str:
    """A TOML file that build() makes the same of; fields that are None are left out."""
    tables: dict[str, list[str]] = {}
    for name, value in flat(settings):
        table, _, key = name.rpartition(".")
        if value is not None:
            tables.setdefault(table, []).append(f"{key} = {json_of(value)}")
    return "\n".join(f"[{table}]\n" + "\n".join(lines) + "\n" for table, lines in tables.items())


def json_of(value: Any) -> str:
    """A value in words that TOML and JSON share."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # a date, which TOML has
        return f"{value!s:.60}"
    return text.replace("\x7f", "\\u007f")
