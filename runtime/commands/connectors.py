"""``connectors``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.connectors import Targets, list_gateways, list_hosts

if TYPE_CHECKING:
    from runtime.settings import Settings


def list_connectors(settings: Settings) -> dict[str, Any]:
    """Gateways and targets of this deployment by name, those of the user's folder marked, with the hosts they call."""
    targets = Targets(settings.connectors.targets)
    own = targets.list_own()
    found = targets.list_all()
    hosts: dict[str, set[str]] = {name: set() for name in found}
    for called in list_hosts(found.values()):
        hosts[called.connector].update(called.origins)
    return {
        "gateways": {
            name: {"gateway": gateway.display_name, "status": gateway.status.value}
            for name, gateway in list_gateways().items()
        },
        "targets": {
            name: {
                "target": target.display_name,
                "status": target.status,
                "from": str(settings.connectors.targets) if name in own else "remitstream",
                "calls": sorted(hosts[name]) or "the host in the instance's settings",
            }
            for name, target in found.items()
        },
    }
