"""What every command of the desk needs: who acts, the topics, and the errors of acts that are refused."""

from __future__ import annotations

import os
import pwd
import socket
from typing import TYPE_CHECKING

from schemas import wire
from schemas.failure import FatalError
from schemas.keys import HmacKey
from topics.audit import Act, Actor, AuditLog, read_acts
from topics.registry import Registry, SchemaMissing

if TYPE_CHECKING:
    from runtime.settings import Settings


class NothingFound(FatalError):
    """An id of the desk names nothing."""

    code = "RS403"
    meaning = "No dead letter, unknown outcome, review or proposal has this id."
    default_remedy = "List them with `remitstream dlq list --all`, `unknown list`, `reviews list` or `audit list`."


class ActRefused(FatalError):
    """An act of a person is not possible, or not any more."""

    code = "RS404"
    meaning = "What was asked for cannot be done to this dead letter or review in the state it is in."
    default_remedy = "Look at it with the command's `show`; nothing was changed."


class SecondPersonNeeded(FatalError):
    """The one who proposed may not approve."""

    code = "RS405"
    meaning = "An edit or waiver of money is released by a second person, not by the one who proposed it."
    default_remedy = "Ask a colleague to look at the proposal and to approve it under their own name."


def find_actor(by: str, why: str) -> Actor:
    """The person at the keyboard, as the operating system and they themselves say. Raises ``ReasonRefused``."""
    user = pwd.getpwuid(os.getuid()).pw_name
    actor = Actor(os_user=user, host=socket.gethostname(), by=by.strip(), why=why.strip())
    actor.check()
    return actor


class Office:
    """The desk of one deployment: settings, registry and audit log."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.registry = Registry(settings.registry)
        self._schema_ids: dict[str, int] = {}
        self.key = HmacKey(settings.secrets.hmac_key.get_secret_value().encode())

    def open_log(self, actor: Actor, *, seen: int | None = None) -> AuditLog:
        """The audit log, for this person's acts; a context manager. With ``seen``, only if that was the last act."""
        return AuditLog(self.settings.kafka, self.key, actor, seen=seen)

    def read_acts(self) -> list[Act]:
        """Everything done so far."""
        return read_acts(self.settings.kafka)

    def find_last_act(self) -> int:
        """Number of the last act, 0 without any: asked before what is acted on is read."""
        acts = self.read_acts()
        return acts[-1].number if acts else 0

    def find_schema_id(self, topic: str, schema: str) -> int:
        """Registry id of the schema in force. Raises ``SchemaMissing``."""
        found = self._schema_ids.get(topic)
        if found is None:
            found = self.registry.find_id(f"{topic}-value", wire.load_schema(schema))
            if found is None:
                raise SchemaMissing("the schema of this version is not registered.", place=topic)
            self._schema_ids[topic] = found
        return found

    def find_proposal(self, number: int, approver: Actor) -> Act:
        """A proposal that waits for a second person.

        Raises ``NothingFound``, ``ActRefused`` or ``SecondPersonNeeded``.
        """
        acts = self.read_acts()
        proposal = next((act for act in acts if act.number == number and act.act in PROPOSALS), None)
        if proposal is None:
            raise NothingFound("no act with this number is a proposal.", place=str(number))
        for act in acts:
            if act.act == APPROVE and act.facts.get("proposal") == str(number):
                raise ActRefused(f"it was approved already, by act {act.number}.", place=f"proposal {number}")
        if proposal.by.casefold() == approver.by.casefold():
            raise SecondPersonNeeded(f"{proposal.by} proposed it.", place=f"proposal {number}")
        return proposal


PROPOSAL = "proposal"
"""Header of an edited version: number of the act that proposes it."""
PROPOSE_EDIT = "dlq.edit"
PROPOSE_WAIVER = "dlq.waive"
PROPOSE_DISMISSAL = "reviews.dismiss"
PROPOSE_ACCEPTANCE = "reviews.accept"
PROPOSALS = frozenset({PROPOSE_EDIT, PROPOSE_WAIVER, PROPOSE_DISMISSAL, PROPOSE_ACCEPTANCE})
REDRIVE = "dlq.redrive"
REVEAL = "dlq.reveal"
APPROVE = "approve"
DECIDE_UNKNOWN = "unknown.decide"
REVEAL_UNKNOWN = "unknown.reveal"
DECIDE_REVIEW = "reviews.decide"
