"""A stack of its own: its broker and its Redis are restarted and emptied here."""

from __future__ import annotations

from tests.integration.conftest import embedded_stack

__all__ = ["embedded_stack"]
