"""Lists that people bring along: plain lines, CSV from a spreadsheet, JSON lines, JSON; as rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError, shown
from .files import decoded, json_content, read_bytes

SEPARATORS = (",", ";", "\t")
LINES, TABLES, JSON_LINES = (".txt",), (".csv", ".tsv"), (".jsonl", ".ndjson")


def ending(path: str | Path) -> str:
    """Of a file's name, in lower case: ".csv"."""
    return Path(path).suffix.lower()


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text that are not blank, without the space around them.

    Raises:
        UserError: there is no such file, or it is not text.
    """
    text = decoded(read_bytes(path, what), path, what)
    # Not splitlines(), which also breaks at characters that may be part of a prompt.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def read_table(path: str | Path, what: str) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its first line; separated by commas, semicolons or tabs.

    Raises:
        UserError: it cannot be read as CSV, a name occurs twice, or a row has more values than there are names.
    """
    text = decoded(read_bytes(path, what), path, what)
    header = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(SEPARATORS, key=header.count)
    try:
        # strict: a quote that is never closed would swallow the rest of the file.
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, restval="", strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        names, rows = list(reader.fieldnames), list(reader)
    except csv.Error as error:
        raise UserError(f"The {what} {path} cannot be read as CSV: {error}.") from None
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"The {what} {path} has two columns that are called {shown(twice)}.")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise UserError(
                f"Row {number} of the {what} {path} has more values than there are columns; put a text that contains "
                f"{shown(separator)} in double quotes."
            )
    return rows


def read_json_lines(path: str | Path, what: str) -> list:
    """The value on each line that is not blank.

    Raises:
        UserError: a line is not JSON.
    """
    values = []
    for number, line in enumerate(read_lines(path, what), 1):
        values.append(json_content(line, f"Line {number} of the {what} {path}"))
    return values


def read_rows(path: str | Path, what: str) -> Iterator[tuple[str, dict]]:
    """The rows of a CSV or JSON-lines file, or of a JSON list of objects; each with its place, for errors.

    Raises:
        UserError: see `read_table` and `read_json_lines`; or a row is not an object.
    """
    kind = ending(path)
    if kind in TABLES:
        values: list = read_table(path, what)
    elif kind in JSON_LINES:
        values = read_json_lines(path, what)
    else:
        values = json_content(decoded(read_bytes(path, what), path, what), f"The {what} {path}")
    if not isinstance(values, list):
        raise UserError(f"The {what} {path} is not a list of objects.")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise UserError(f"{path}: row {number} must be an object, not {shown(json.dumps(value))}.")
        yield f"{path}: row {number}", value
