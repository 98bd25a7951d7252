"""Failure kinds, and the errors people see.

Two trees, kept apart:

* ``FailureKind`` says what one record or one call means for the machinery (dead letter, wait, ask a person).
  It is data: dead letters and outcomes carry it.
* ``OperatorError`` and its subclasses are what a person reads. Each has a code, a place and a remedy, and each is
  listed in ``docs/errors.md``, which is generated from the subclasses.

    OperatorError
    ├── ConfigurationError   exit 78: a setting is wrong; nothing was started
    ├── TemporaryError       exit 75: try again; nothing was lost
    └── FatalError           exit 1:  a person must look before it can go on

    Failure                  one record cannot be handled; carries a kind and codes, never payload text
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import ClassVar


class FailureKind(StrEnum):
    """What a failed record or call means for the machinery."""

    INVALID = "INVALID"
    """Unparsable, or against the schema: dead letter now."""
    UNMAPPED = "UNMAPPED"
    """A required mapped field is missing: dead letter now, redrive after the mapping is mended."""
    REJECTED = "REJECTED"
    """The target said no to this record."""
    DUPLICATE = "DUPLICATE"
    """The target has it already under our own key: success, counted."""
    AUTH = "AUTH"
    """Our credentials are refused: pause the target and page; never drain into the DLQ."""
    RATE_LIMITED = "RATE_LIMITED"
    """Wait as told; not an attempt."""
    UNAVAILABLE = "UNAVAILABLE"
    """Never arrived (refused, no route): back off and try again."""
    AMBIGUOUS = "AMBIGUOUS"
    """May have been applied (timeout or cut after the write): resolve by class, never resend blindly."""
    INTERNAL = "INTERNAL"
    """Our own code raised for this record: dead letter with the exception's type."""


class Failure(Exception):
    """One record that cannot be handled.

    ``code`` is an upper-case word such as ``AMOUNT_MISSING``; ``field`` names the field; neither ever holds payload
    text, because both are written to the reason of a dead letter.
    """

    def __init__(self, kind: FailureKind, code: str, field: str = "") -> None:
        super().__init__(f"{kind}:{code}:{field}" if field else f"{kind}:{code}")
        self.kind = kind
        self.code = code
        self.field = field


class ExitCode(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    RETRY = 75
    CONFIGURATION = 78


class OperatorError(Exception):
    """An error a person reads: ``code``, ``place`` (setting, file and line, topic, port) and ``remedy``.

    Subclasses set the class attributes; ``remedy`` may be refined per raise. The text never holds payload, PHI or a
    secret.
    """

    code: ClassVar[str] = ""
    meaning: ClassVar[str] = ""
    default_remedy: ClassVar[str] = ""
    exit_code: ClassVar[ExitCode] = ExitCode.FAILED

    def __init__(self, detail: str, *, place: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.place = place
        self.remedy = remedy or self.default_remedy

    def __str__(self) -> str:
        return f"{self.code} at {self.place}: {self.detail} Remedy: {self.remedy}"


class ConfigurationError(OperatorError):
    """A setting is wrong; nothing was started."""

    code = "RS100"
    meaning = "A setting is missing or wrong."
    default_remedy = "Correct the named setting; `remitstream config check` lists all of them at once."
    exit_code = ExitCode.CONFIGURATION


class TemporaryError(OperatorError):
    """Something is not there yet; trying again is right and nothing was lost."""

    code = "RS200"
    meaning = "A service is not reachable or not ready."
    default_remedy = "Check that the named service is up, then run the same command again."
    exit_code = ExitCode.RETRY


class FatalError(OperatorError):
    """A person must look before it can go on; offsets and data are untouched."""

    code = "RS300"
    meaning = "A guarantee would be broken by going on."
    default_remedy = "Read the detail; nothing was changed."
    exit_code = ExitCode.FAILED
