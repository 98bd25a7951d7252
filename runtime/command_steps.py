"""What commands share: common options, and the steps from them to the settings, a module and an exit code."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.configuration import show_path

if TYPE_CHECKING:
    from runtime.settings import Settings

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Configuration file; default $REMITSTREAM_CONFIG or remitstream.toml."
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One setting, for example `targets.epic-north.port=2575`; repeatable."
    ),
]
Embedded = Annotated[
    bool | None,
    typer.Option(
        "--embedded/--no-embedded", help="Use the embedded stack, or your own services, whatever the file says."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def read_assignments(texts: Sequence[str] | None, *, embedded: bool | None) -> list[tuple[str, str]]:
    """The pairs of ``--set`` and ``--embedded``."""
    pairs = []
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip("."):
            raise typer.BadParameter("give KEY=VALUE, for example worker.partitions=8", param_hint="--set")
        pairs.append((key.strip(), value))
    if embedded is not None:
        pairs.append(("stack.embedded", str(embedded).lower()))
    return pairs


def open_settings(
    config: Path | None, assignments: Sequence[str] | None, *, embedded: bool | None, create_secrets: bool = False
) -> Settings:
    """Read the settings; with ``create_secrets`` the embedded mode's missing secret files are made first."""
    module = importlib.import_module("runtime.settings")
    pairs = read_assignments(assignments, embedded=embedded)
    if create_secrets:
        for path in module.ensure_secrets(config, pairs):
            typer.echo(f"created {show_path(path)}", err=True)
    settings: Settings = module.read_settings(config, pairs)
    return settings


def open_attached(config: Path | None, assignments: Sequence[str] | None, *, embedded: bool | None) -> Settings:
    """Read the settings and find the services."""
    settings = open_settings(config, assignments, embedded=embedded)
    attached: Settings = importlib.import_module("runtime.commands.stack").attach(settings)
    return attached


def open_stack(config: Path | None, assignments: Sequence[str] | None, *, embedded: bool | None) -> Any:
    """The embedded stack of these settings."""
    return importlib.import_module("runtime.commands.stack").open_stack(
        open_settings(config, assignments, embedded=embedded)
    )


def load(module: str, function: str) -> Callable[..., Any]:
    """A function of a module, imported only now."""
    body: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return body


def run_role(role: str, settings: Settings, *arguments: Any, **options: Any) -> None:
    """Run a process until it ends, and exit with its code."""
    exit_with(load(f"runtime.roles.{role}", "run")(settings, *arguments, **options))


def exit_with(code: int) -> None:
    """End the command with a code; 0 goes on."""
    if code:
        raise typer.Exit(int(code))
