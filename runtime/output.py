"""What commands print: data as text or JSON on standard output, errors with code, place and remedy."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from pydantic_core import to_jsonable_python

from runtime.configuration import SettingsError
from schemas.failure import ExitCode, FatalError, OperatorError
from telemetry.masking import describe_exception


class UnexpectedError(FatalError):
    """An exception nobody foresaw; only its type and place are told."""

    code = "RS390"
    meaning = "The program met a situation it does not know; its values are not shown, because they may be private."
    default_remedy = "Report the type and place together with the version; what was processed is accounted for."


class FileRefused(FatalError):
    """The operating system does not let us use a file or folder."""

    code = "RS397"
    meaning = "A file or folder that is needed cannot be used: read-only, not permitted, or its disk is full."
    default_remedy = "Make it writable for this user or free space there; `remitstream config show` lists our folders."


_REFUSALS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT})


def wrap_unexpected(error: Exception) -> FatalError:
    """Type, place and causes of any exception, never its text. Of a refused file: which, and why."""
    if isinstance(error, OSError) and error.errno in _REFUSALS and error.filename:
        return FileRefused(f"{os.strerror(error.errno)}.", place=str(error.filename))
    told = describe_exception(error)
    causes = " after ".join(told.get("causes", ()))
    return UnexpectedError(f"{told['error']}{f' after {causes}' if causes else ''}.", place=told["place"] or "start")


def print_data(data: Any, *, as_json: bool) -> None:
    """Data for people (indented lines) or for programs (one JSON document)."""
    plain = to_jsonable_python(data)
    typer.echo(json.dumps(plain, indent=2, ensure_ascii=False) if as_json else "\n".join(_render(plain)))


def print_error(error: OperatorError, *, as_json: bool) -> ExitCode:
    """Tell an error (JSON goes to standard output, text to standard error) and return its exit code."""
    if as_json:
        told: dict[str, Any] = {
            "code": error.code,
            "place": error.place,
            "detail": error.detail,
            "remedy": error.remedy,
            "exit_code": int(error.exit_code),
        }
        if isinstance(error, SettingsError):
            told["issues"] = error.list_issues()
        print_data({"error": told}, as_json=True)
    else:
        sys.stdout.flush()
        colour = sys.stderr.isatty()
        head = (
            typer.style(f"{error.code} at {error.place}", fg="red", bold=True)
            if colour
            else f"{error.code} at {error.place}"
        )
        typer.echo(f"{head}\n{error.detail}\nRemedy: {error.remedy}", err=True)
    return error.exit_code


def _render(data: Any, indent: str = "") -> list[str]:
    if isinstance(data, Mapping):
        lines = []
        for key, value in data.items():
            if isinstance(value, (Mapping, list)) and value:
                lines += [f"{indent}{key}:", *_render(value, indent + "  ")]
            else:
                lines.append(f"{indent}{key}: {_show(value)}")
        return lines
    if isinstance(data, Sequence) and not isinstance(data, str):
        lines = []
        for value in data:
            if isinstance(value, (Mapping, list)):
                block = _render(value, indent + "  ")
                lines += [f"{indent}- {block[0].lstrip()}", *block[1:]] if block else [f"{indent}-"]
            else:
                lines.append(f"{indent}{_show(value)}")
        return lines
    return [f"{indent}{_show(data)}"]


def _show(value: Any) -> str:
    if value is None or value in ({}, []):
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)
