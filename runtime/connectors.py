"""The connectors of this installation, as the settings and the generated tables need them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from sinks import catalog as target_catalog
from sinks.contract import Target, TargetSettings
from sources import catalog as gateway_catalog
from sources.contract import Gateway


class UnknownTarget(TargetSettings):
    """A target whose connector does not exist: only what all targets share can be checked."""

    model_config = ConfigDict(extra="allow")


def list_gateways() -> dict[str, Gateway]:
    """All payment gateways by name."""
    return gateway_catalog.discover()


def list_targets() -> dict[str, Target]:
    """All target connectors by name."""
    return target_catalog.discover()


def find_target_model(entry: Any) -> type[BaseModel]:
    """Settings model of the connector that one ``[[targets]]`` table names."""
    name = entry.get("connector") if isinstance(entry, dict) else None
    target = list_targets().get(name) if isinstance(name, str) else None
    return target.settings if target is not None else UnknownTarget
