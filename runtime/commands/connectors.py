"""``connectors``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.connectors import Gateways, Targets, list_hosts

if TYPE_CHECKING:
    from runtime.settings import Settings


def list_connectors(settings: Settings) -> dict[str, Any]:
    """Gateways and targets of this deployment by name, those of the user's folder marked, with the hosts they call."""
    gateways, targets = Gateways(settings.connectors.gateways), Targets(settings.connectors.targets)
    own_gateways, own = gateways.list_own(), targets.list_own()
    found = targets.list_all()
    hosts: dict[str, set[str]] = {name: set() for name in found}
    for called in list_hosts(found.values()):
        hosts[called.connector].update(called.origins)
    return {
        "gateways": {
            name: {
                "gateway": gateway.display_name,
                "status": gateway.status.value,
                "from": str(settings.connectors.gateways) if name in own_gateways else "remitstream",
            }
            for name, gateway in gateways.list_all().items()
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
