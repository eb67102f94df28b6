"""Settings, described once: a dataclass whose fields have limits, and a docstring below each.

@dataclass(frozen=True)
class Sampling:
    seed: Annotated[int, Between(0, 2**40)] = 0
    '''Of all random choices.'''

Everything else follows from it: the options of a command line with their help (`add_options`,
`from_arguments`), the constants on top of a script (`from_constants`), the check of an instance made in
Python (`check`), and what a record keeps (`record`, `from_record`). A value may be a bool, int, float, str, Path,
one of a Literal, a tuple or dict of these, or None where the type says so. The fields of a dataclass in a
dataclass count as its own.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import UserError, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Between:
    """Limits of a number, both included."""

    low: float
    high: float = math.inf


@dataclass(frozen=True)
class Must:
    """What else a value has to be: `holds(value)`, said as "NAME must .."."""

    holds: Callable[[Any], bool]
    what: str


@dataclass(frozen=True)
class Written:
    """How a value looks on the command line, for the help: "TOKEN_ID=BIAS"."""

    form: str


@dataclass(frozen=True)
class Kind:
    """A field's type, taken apart."""

    type: Any
    optional: bool = False
    limits: Between | None = None
    musts: tuple[Must, ...] = ()
    form: str | None = None

    def inner(self) -> list[Kind]:
        """Of a tuple's items, or a dict's keys and values."""
        return [kind_of(part) for part in get_args(self.type) if part is not ...]


@dataclass(frozen=True, eq=False)
class Item:
    """One field, in whatever depth. `name` is what people call it, with underscores."""

    path: tuple[str, ...]
    name: str
    kind: Kind
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def constant(self) -> str:
        return self.name.upper()


def kind_of(hint) -> Kind:
    optional, limits, musts, form = False, None, [], None
    while True:
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
            limits = next((mark for mark in marks if isinstance(mark, Between)), limits)
            form = next((mark.form for mark in marks if isinstance(mark, Written)), form)
            musts += [mark for mark in marks if isinstance(mark, Must)]
        elif get_origin(hint) in (Union, types.UnionType):
            (hint,) = (part for part in get_args(hint) if part is not type(None))
            optional = True
        else:
            return Kind(hint, optional, limits, tuple(musts), form)


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line; none if the source is not available."""
    import ast
    import inspect
    import textwrap

    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except OSError:
            continue
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef))
        for node, below in zip(body, body[1:], strict=False):
            if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
                continue
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                docs[node.target.id] = " ".join(str(below.value.value).split())
    return docs


def settings_of(
    described: type | object, names: Mapping[str, str] | None = None, prefixed: Sequence[str] = ()
) -> list[Item]:
    """All settings of a dataclass, or of an instance, whose values are then the defaults.

    Args:
        names: field -> what people call it, if not by its own name.
        prefixed: fields with a dataclass of their own whose name stands before those of its fields.
    """
    return list(_walk(described, names or {}, prefixed, (), ""))


def _walk(
    described, names: Mapping[str, str], prefixed: Sequence[str], path: tuple[str, ...], prefix: str
) -> Iterator[Item]:
    cls = described if isinstance(described, type) else type(described)
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        if cls is not described:
            default = getattr(described, field.name)
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        else:
            default = field.default
        kind, name = kind_of(hints[field.name]), prefix + names.get(field.name, field.name)
        if is_dataclass(kind.type):
            inner = kind.type if default is MISSING else default
            before = f"{name}_" if field.name in prefixed else prefix
            yield from _walk(inner, names, prefixed, (*path, field.name), before)
        else:
            yield Item((*path, field.name), name, kind, default, field_docs(cls).get(field.name, ""))


# What a value may be, and how it is read


def checked(value, kind: Kind, name: str):
    """The value in its plain Python type.

    Raises:
        UserError: it is not valid for this setting.
    """
    if value is None and kind.optional:
        return None
    try:
        plain = _plain(value, kind)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be {wanted(kind, value)}, not {shown(value)}.") from None
    for must in kind.musts:
        if not must.holds(plain):
            raise UserError(f"{name} must {must.what}{' or be None' if kind.optional else ''}, not {shown(value)}.")
    return plain


def _plain(value, kind: Kind):
    """Raises TypeError or ValueError for anything else."""
    base = get_origin(kind.type) or kind.type
    if base is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if base in (int, float):
        if isinstance(value, bool) or not isinstance(value, Integral if base is int else Real):
            raise TypeError
        number, limits = base(value), kind.limits or Between(-math.inf)
        if not limits.low <= number <= limits.high or not math.isfinite(number):
            raise ValueError
        return number
    if base is Literal:
        if not isinstance(value, str) or value not in get_args(kind.type):
            raise ValueError
        return value
    if base in (str, Path):
        text = os.fspath(value)
        if not isinstance(text, str) or not text.strip() or (base is Path and "\x00" in text):
            raise ValueError
        return base(text)
    inner = kind.inner()
    if base is tuple:
        if isinstance(value, (str, dict)):
            raise TypeError
        items = [value] if isinstance(value, (Real, os.PathLike)) else list(value)
        if not items:
            raise ValueError
        return tuple(_plain(item, inner[0]) for item in items)
    if base is dict:
        return {_plain(key, inner[0]): _plain(item, inner[1]) for key, item in dict(value).items()}
    raise TypeError(f"settings cannot be of type {kind.type}")


def wanted(kind: Kind, value=None) -> str:
    """What a value must be, in words; for a number out of its limits, the limits."""
    base = get_origin(kind.type) or kind.type
    none = " or None" if kind.optional else ""
    if base in (int, float):
        noun = "a whole number" if base is int else "a number"
        limits = kind.limits or Between(-math.inf)
        if limits.high < math.inf:
            between = f"between {limits.low:.10g} and {limits.high:.15g}"
            is_number = isinstance(value, Integral if base is int else Real) and not isinstance(value, bool)
            return f"{between}{none}" if is_number else f"{noun} {between}{none}"
        return noun + (f" of at least {limits.low:.10g}" if limits.low > -math.inf else "") + none
    if base is Literal:
        return f"one of {', '.join(get_args(kind.type))}{none}"
    if base in (tuple, dict):
        parts = [wanted(part) for part in kind.inner()]
        return (f"a tuple, each item {parts[0]}" if base is tuple else f"a dict of {parts[0]} to {parts[1]}") + none
    return {bool: "True or False", str: "text", Path: "a path"}[base] + none


def parsed(text: str | Sequence[str], kind: Kind, name: str):
    """The value that a text on the command line or in the environment stands for, checked.

    Tuples are "a,b" (whole numbers also "2,4-6"), dictionaries "key=value key=value" or a sequence of such texts.
    """
    if kind.optional and text in ("", "None", "none"):
        return None
    return checked(_parse(text, kind, name), kind, name)


def _parse(text, kind: Kind, name: str):
    base = get_origin(kind.type) or kind.type
    if base is bool:
        return {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}.get(text.lower(), text)
    if base in (int, float):
        try:
            return base(text)
        except ValueError:
            return text  # `checked` says what is wrong with it
    if base is tuple:
        (item,) = kind.inner()
        if item.type is int:
            return _parse_whole_numbers(text, name)
        return tuple(_parse(part.strip(), item, name) for part in text.split(","))
    if base is dict:
        key, value = kind.inner()
        texts = [text] if isinstance(text, str) else text
        pairs = [part.partition("=") for one in texts for part in one.split()]
        if broken := [left for left, equals, _ in pairs if not equals]:
            raise UserError(f"{name} {shown(broken[0])} must look like {_metavar(kind)}.")
        for left, _, right in pairs:
            for part, part_kind in ((left, key), (right, value)):
                try:
                    _plain(_parse(part, part_kind, name), part_kind)
                except (TypeError, ValueError, OverflowError):
                    example = f"{_metavar(kind)}: {shown(part)} is not {wanted(part_kind)}"
                    raise UserError(f"{name} {shown(f'{left}={right}')} must look like {example}.") from None
        return {_parse(left, key, name): _parse(right, value, name) for left, _, right in pairs}
    return text


def _parse_whole_numbers(text: str, name: str) -> tuple[int, ...]:
    """ "2,4-6" -> 2, 4, 5, 6."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            start, stop = int(first), int(last if dash else first)
        except ValueError:
            raise UserError(f"{name} {shown(text)} must look like 2,4-6.") from None
        if stop < start or stop - start > 100_000:
            raise UserError(f"{name} {shown(text)} names no numbers: {part.strip()} is not a range from low to high.")
        numbers += range(start, stop + 1)
    return tuple(numbers)


def _metavar(kind: Kind) -> str | None:
    base = get_origin(kind.type) or kind.type
    if kind.form:
        return kind.form
    if base is tuple:
        (item,) = kind.inner()
        return "N,N-N" if item.type is int else f"{_metavar(item) or 'A'},.."
    if base is dict:
        key, value = kind.inner()
        return f"{_metavar(key) or 'NAME'}={_metavar(value) or 'VALUE'}"
    return {int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(base)


# The command line


class Parser(argparse.ArgumentParser):
    """argparse's, but `--option=--` gives no empty list, as it does before Python 3.13 whatever the option's type."""

    def parse_known_args(self, args=None, namespace=None):
        arguments, rest = super().parse_known_args(args, namespace)
        for name, value in vars(arguments).items():
            if value == [] or (isinstance(value, list) and [] in value):
                self.error(f"argument --{name.replace('_', '-')}: expected a value, not '--'")
        return arguments, rest


def add_options(
    parser: argparse.ArgumentParser,
    described: type | object,
    names: Mapping[str, str] | None = None,
    omit: Sequence[str] = (),
    chosen: bool = False,
) -> None:
    """One option for each setting.

    Args:
        described: a dataclass, or an instance, whose values are then the defaults.
        omit: fields that get none.
        chosen: say in the help that a value is chosen if none is given, instead of a default.
    """
    for setting in settings_of(described, names):
        if setting.path[-1] not in omit:
            _add_option(parser, setting, None if chosen else setting.default)


def _add_option(parser: argparse.ArgumentParser, setting: Item, default, also: str | None = None) -> None:
    kind, text = setting.kind, setting.help.removesuffix(".").replace("%", "%%")
    base = get_origin(kind.type) or kind.type
    flags = [setting.flag, *(["--" + also.lower().replace("_", "-")] if also else [])]
    if default is None or default is MISSING:
        text += " (default: chosen)" if default is None and not kind.optional else ""
    elif default != {}:
        text += f" (default {_worded(default)})".replace("%", "%%")
    if base is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    options: dict[str, Any] = {"help": text, "metavar": _metavar(kind)}
    if base is Literal:
        options["metavar"] = f"{{{','.join(map(str, get_args(kind.type)))}}}"
    elif base is dict:
        options["action"] = "append"
    parser.add_argument(*flags, **options)


def _worded(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(_worded, value))
    if isinstance(value, dict):
        return " ".join(f"{key}={_worded(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def given(described: type | object, arguments: argparse.Namespace, omit: Sequence[str] = ()) -> dict:
    """The settings that were given as options: field name -> value, without those of `omit`.

    Raises:
        UserError: an invalid value, naming the option.
    """
    settings = [setting for setting in settings_of(described) if setting.path[-1] not in omit]
    return {setting.path[-1]: value for setting, value in _given(settings, arguments)}


def _given(settings: list[Item], arguments: argparse.Namespace) -> Iterator[tuple[Item, Any]]:
    for setting in settings:
        value = getattr(arguments, setting.name, None)
        if value is not None:
            parse = checked if isinstance(value, bool) else parsed
            yield setting, parse(value, setting.kind, setting.flag)


def from_arguments(described: type[T] | T, arguments: argparse.Namespace, names: Mapping[str, str] | None = None) -> T:
    """The dataclass from the options, with defaults for those not given.

    Raises:
        UserError: an invalid value, naming the option.
    """
    settings = settings_of(described, names)
    values = {setting.path: setting.default for setting in settings if setting.default is not MISSING}
    values |= {setting.path: value for setting, value in _given(settings, arguments)}
    return _build(described if isinstance(described, type) else type(described), values)


def _build(cls: Any, values: Mapping[tuple[str, ...], Any], path: tuple[str, ...] = ()) -> Any:
    hints = get_type_hints(cls, include_extras=True)
    arguments = {}
    for field in fields(cls):
        kind, place = kind_of(hints[field.name]), (*path, field.name)
        if is_dataclass(kind.type):
            arguments[field.name] = _build(kind.type, values, place)
        elif place in values:
            arguments[field.name] = values[place]
    return cls(**arguments)


def from_environment(described: T) -> T:
    """The instance, with variables of the environment in place of its values where they are set: FIELD for `field`.

    Raises:
        UserError: an invalid value, naming the variable.
    """
    values = {}
    for setting in settings_of(described):
        text = os.environ.get(setting.constant)
        values[setting.path] = parsed(text, setting.kind, setting.constant) if text else setting.default
    return _build(type(described), values)


# Constants on top of a script


def from_constants(
    cls: type[T],
    constants: Mapping[str, Any],
    argv: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    also: Mapping[str, str] | None = None,
) -> T:
    """The settings of a script: constant, overridden by the environment variable of that name, by the option.

    A field `num_pairs` is the constant NUM_PAIRS and the option --num-pairs. A field with a default may do without a
    constant; it is then no option either. A constant may hold a whole dataclass (LIMITS = Limits(..)); its
    fields are --limits-kl and so on. Exits, as argparse does, after --help and for an option there is not.

    Args:
        constants: `globals()` of the script, with its docstring.
        also: constant -> a second name that sets it, PAIRS as environment variable and --pairs.
    Raises:
        UserError: a value that cannot be, by the name it was given under.
    """
    prefixed = [field.name for field in fields(cls) if is_dataclass(constants.get(field.name.upper()))]
    values = {}
    for setting in settings_of(cls, names, prefixed):
        if setting.path[0] in prefixed:
            values[setting] = getattr(constants[setting.path[0].upper()], setting.path[-1])
        elif setting.constant in constants or setting.default is MISSING:
            values[setting] = constants[setting.constant]
    parser = Parser(
        prog=Path(str(constants.get("__file__", "script"))).name,
        description=_filled(constants.get("__doc__") or ""),
        epilog="Each can also be set by the constant on top of the script, or an environment variable of that name.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for setting, value in values.items():
        _add_option(parser, setting, value, (also or {}).get(setting.constant))
    options = dict(_given(list(values), parser.parse_args(argv)))
    chosen = {}
    for setting, value in values.items():
        variables = [setting.constant, *filter(None, [(also or {}).get(setting.constant)])]
        variable = next((name for name in variables if name in os.environ), None)
        if setting in options:
            chosen[setting.path] = options[setting]
        elif variable:
            chosen[setting.path] = parsed(os.environ[variable], setting.kind, variable)
        else:
            chosen[setting.path] = checked(value, setting.kind, setting.constant)
    return _build(cls, chosen)


# Instances made in Python, and records


def _filled(text: str) -> str:
    """Paragraphs at 80 columns; indented ones, as of commands, stay as they are."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(p if p.startswith(" ") else textwrap.fill(" ".join(p.split()), 80) for p in paragraphs)


def check(instance: object, names: Mapping[str, str] | None = None) -> None:
    """Raise UserError for a value that cannot be, by its field's name or the one in `names`."""
    for setting in settings_of(instance, names):
        checked(setting.default, setting.kind, setting.name)


def check_given(cls: type, values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """The same for some fields' values, before there is an instance; None means that a value was not given."""
    for setting in settings_of(cls, names):
        if (value := values.get(setting.path[-1])) is not None:
            checked(value, setting.kind, setting.name)


def record(instance: object, names: Mapping[str, str] | None = None) -> dict:
    """Name -> value as JSON keeps it: paths are texts, tuples lists, dictionaries ["key=value", ..] or None."""
    return {setting.name: _recorded(setting.default) for setting in settings_of(instance, names)}


def _recorded(value):
    if isinstance(value, dict):
        return [f"{key}={_exact(item)}" for key, item in value.items()] or None
    if isinstance(value, (tuple, list)):
        return [_recorded(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _exact(value) -> str:
    """A number, or several, without losing a digit."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(_exact, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def from_record(cls: type[T], content: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None) -> T:
    """The settings that a record keeps; `where` names it in the errors.

    Raises:
        UserError: one is missing or cannot be.
    """
    values = {}
    for setting in settings_of(cls, names):
        name = f"{where}: {setting.name}"
        if setting.name not in content:
            raise UserError(f"{where} has no {setting.name}.")
        value = content[setting.name]
        if get_origin(setting.kind.type) is dict:
            if not isinstance(value, (list, type(None))) or not all(isinstance(item, str) for item in value or []):
                raise UserError(f"{name} must be a list of texts like {_metavar(setting.kind)}, not {shown(value)}.")
            value = _parse(value or [], setting.kind, name)
        values[setting.path] = checked(value, setting.kind, name)
    return _build(cls, values)
