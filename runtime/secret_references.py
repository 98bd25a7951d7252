"""Secrets: the configuration holds references (``env:NAME``, ``file:/path``), never the secret itself."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from runtime.configuration import Issue, Key
from runtime.layers import Merged

REFERENCE_RULE = "`env:NAME` (an environment variable) or `file:/path` (a file that holds only the secret)"


def resolve(
    key: Key, given: Any, merged: Merged, environment: Mapping[str, str], *, embedded: bool
) -> tuple[SecretStr | None, Issue | None]:
    """The secret of a reference, or what is wrong with it. Only references are ever repeated."""
    origin = merged.find_origin(key)
    place = merged.say_place(key)
    folder = origin.folder if origin is not None else Path.cwd()

    def complain(problem: str, given: str = "", remedy: str = "") -> tuple[None, Issue]:
        return None, Issue(
            key=merged.spell(key), place=place, problem=problem, given=given, accepted=REFERENCE_RULE, remedy=remedy
        )

    kind, _, name = given.partition(":") if isinstance(given, str) else ("", "", "")
    if kind == "env" and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        value = environment.get(name, "")
        if not value:
            return complain(f"environment variable {name} is not set or empty.", f"env:{name}", f"Set {name}.")
    elif kind == "file" and name:
        path = join_path(folder, name)
        try:
            value = path.read_text().rstrip("\r\n")
        except FileNotFoundError:
            remedy = "Create it, readable by this user only."
            if embedded:
                remedy = (
                    "In the embedded mode `remitstream run` and `remitstream stack up` create it with random content."
                )
            return complain(f"there is no file {path}.", f"file:{name}", remedy)
        except (OSError, UnicodeDecodeError) as error:
            return complain(f"{path} cannot be read ({type(error).__name__}).", f"file:{name}", "Correct the file.")
        if not value:
            return complain(f"{path} is empty.", f"file:{name}", "Write the secret into it.")
    else:
        return complain(
            "a secret must be a reference; what is written there is not shown.",
            "",
            "Move the secret to a variable or a file; if it was shared or committed, renew it.",
        )
    return SecretStr(value), None


def join_path(folder: Path, text: str) -> Path:
    """A path as written in a file of that folder, absolute and without ``..``."""
    return Path(os.path.normpath(folder / Path(text).expanduser()))


def create_file(path: Path) -> bool:
    """Create a file with a fresh random secret, readable by this user only; False when it is there already."""
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Written beside it and linked, so that nobody ever reads a half-written secret and nobody's file is replaced.
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # mode 0600
        file.write(secrets.token_urlsafe(32) + "\n")
        file.flush()
        try:
            os.link(file.name, path)
        except FileExistsError:
            return False
    return True
