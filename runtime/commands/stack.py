"""``stack up|down|status|reset``, and how other commands find a running embedded stack."""

from __future__ import annotations

from typing import Any

import typer

from runtime.settings import Settings
from runtime.stack import EmbeddedStack, StackAddresses
from schemas.failure import ConfigurationError, TemporaryError

_LARGE = 10_000_000
"""Bytes from which a download is told in tenths."""


class StackDownError(TemporaryError):
    """The embedded stack is asked for and does not run."""

    code = "RS290"
    meaning = "The settings ask for the embedded stack, and it is not running."
    default_remedy = "Run `remitstream stack up` with the same settings, or set the addresses of your own services."


class NotEmbeddedError(ConfigurationError):
    """A stack command where the services are the user's own."""

    code = "RS106"
    meaning = "A `stack` command was given, and the settings name your own Kafka, registry and Redis."
    default_remedy = "Set `stack.embedded = true` (flag `--embedded`) to use the embedded stack."


def open_stack(settings: Settings) -> EmbeddedStack:
    """The embedded stack of these settings. Raises ``NotEmbeddedError``."""
    if not settings.embedded:
        raise NotEmbeddedError("the embedded stack is not in use.", place="stack.embedded")
    return EmbeddedStack(settings.stack.home, settings.stack.cache, mirror=settings.stack.mirror)


def attach(settings: Settings) -> Settings:
    """The settings with the addresses of the running embedded stack; unchanged where the services are the user's own.

    Addresses given by a flag are kept: a parent process passed them on. Raises ``StackDownError``.
    """
    if not settings.embedded or settings.find_origin(("kafka", "bootstrap")) is not None:
        return settings
    stack = open_stack(settings)
    stopped = [name for name, part in stack.status().items() if part.state == "stopped"]
    if stopped:
        raise StackDownError(f"not running: {', '.join(stopped)}.", place=str(settings.stack.home))
    return set_addresses(settings, stack.read_addresses())


def set_addresses(settings: Settings, addresses: StackAddresses) -> Settings:
    """The settings with these addresses, as flags, so that processes started with them find the same stack."""
    return settings.override(
        {
            "kafka.bootstrap": addresses.kafka_bootstrap,
            "registry.url": addresses.registry_url,
            "redis.url": addresses.redis_url,
        }
    )


def describe(stack: EmbeddedStack) -> dict[str, Any]:
    """What each component does, for ``stack status``."""
    return {
        name: {
            "state": part.state,
            "address": part.address,
            "pid": part.pid,
            "resident_megabytes": part.resident_bytes // 1_000_000 if part.resident_bytes else None,
            "log": part.log,
        }
        for name, part in stack.status().items()
    }


class LineProgress:
    """Tells a start as lines on standard error: one per download and state, each tenth of a large file."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def download(self, file: str, done: int, total: int) -> None:
        """A line for each tenth of a file, only the last for a small one."""
        tenth = 10 * done // total if total else 10
        if tenth <= self._told.get(file, 0) or (total < _LARGE and tenth < 10):
            return
        self._told[file] = tenth
        typer.echo(f"{file}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", err=True)

    def step(self, component: str, state: str) -> None:
        """A line for each change of a component."""
        typer.echo(f"{component}: {state}", err=True)
