"""The connectors of this installation, as the settings and the generated tables need them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from runtime.cross_checks import Known
from sinks.contract import TargetSettings


def find_target_model(entry: Any) -> type[BaseModel]:
    """Settings model of the connector that one ``[[targets]]`` table names; the common part when there is none such."""
    name = entry.get("connector") if isinstance(entry, dict) else None
    common: type[BaseModel] = TargetSettings if importlib.util.find_spec("sinks.catalog") else _OpenTarget
    return _list_target_models().get(name, common) if isinstance(name, str) else common


class _OpenTarget(TargetSettings):
    model_config = ConfigDict(extra="allow")


def discover(catalog: str) -> list[Any] | None:
    """Heads of the connectors on one side; None when that side is not part of this installation."""
    if importlib.util.find_spec(catalog) is None:
        return None
    found = importlib.import_module(catalog).discover()
    return list(found.values() if isinstance(found, Mapping) else found)


def _list_target_models() -> dict[str, type[BaseModel]]:
    return {target.name: target.settings for target in discover("sinks.catalog") or ()}


def list_known() -> Known:
    """Names of all gateways and target connectors."""
    gateways, targets = discover("sources.catalog"), discover("sinks.catalog")
    return Known(
        None if gateways is None else frozenset(gateway.name for gateway in gateways),
        None if targets is None else frozenset(target.name for target in targets),
    )
