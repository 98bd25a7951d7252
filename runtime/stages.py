"""The stages of a deployment, as people look at them: which process, which topics, which group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.account import WORKER_GROUP, name_delivery_group
from sinks.targets.epic_dft import EpicDftSettings
from topics import catalog

if TYPE_CHECKING:
    from runtime.settings import Settings


@dataclass(frozen=True, slots=True)
class Stage:
    """One consuming stage: its consumer group and the topics it reads."""

    name: str
    group: str
    topics: tuple[str, ...]


def list_stages(settings: Settings) -> list[Stage]:
    """The worker, source by source, and every target instance."""
    stages = [Stage(f"worker {source}", WORKER_GROUP, (catalog.name_raw(source),)) for source in settings.sources]
    stages += [
        Stage(target.name, name_delivery_group(target.name), catalog.CANONICAL_MONEY) for target in settings.targets
    ]
    return stages


def list_billing_targets(settings: Settings) -> list[EpicDftSettings]:
    """Targets that the sandbox simulates a billing system for."""
    return [target for target in settings.targets if isinstance(target, EpicDftSettings)]
