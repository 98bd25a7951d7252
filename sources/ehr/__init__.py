"""One file per patient-record feed: the head that says what a feed is, for the catalog and the docs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sources.contract import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedConnector:
    """Head of a patient-record feed: its module in ``sources/ehr/`` holds one as ``FEED``."""

    name: str
    """Source name; the raw topic is ``raw.<name>``."""
    display_name: str
    status: Status
    documentation: str
    """Where the format is described."""
    transport: str
    messages: Mapping[str, str]
    """Messages of interest -> what they do; every other message of a known sender is kept raw and ignored."""

    @property
    def topic(self) -> str:
        """The raw topic this feed's messages go to."""
        return f"raw.{self.name}"
