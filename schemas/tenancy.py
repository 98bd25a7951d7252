"""Who takes part: tenant, facilities with their assigning authorities, gateway accounts, feeds.

Pydantic models of the configuration file's domain part; ``runtime.settings`` reads them, everything else takes them as
arguments. Unknown keys are refused. Secrets arrive here already resolved, as ``SecretStr``.
"""

from __future__ import annotations

from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
"""Names of tenants, facilities, accounts and targets: lower-case letters, digits, dash, underscore."""


class Strict(BaseModel):
    """A settings model that refuses unknown keys and is not changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Authority(Strict):
    """An assigning authority and the other names senders use for it."""

    name: str = Field(min_length=1, description="Canonical name, for example `NORTH`.")
    aliases: tuple[str, ...] = Field(
        default=(), description="Other spellings: HL7 namespace, OID, FHIR identifier system URI."
    )


class Facility(Strict):
    """A facility (hospital, clinic) with its own time zone and patient identifiers."""

    id: Name = Field(description="Name in keys, headers and references.")
    display_name: str = Field(default="", description="Name for people.")
    time_zone: str = Field(description="IANA name, for example `America/Chicago`.")
    default_authority: str = Field(description="Assigning authority of an identifier that names none.")
    authorities: tuple[Authority, ...]
    mapping_overlay: str | None = Field(
        default=None, description="YAML file with this facility's custom attributes (see docs/mappings.md)."
    )

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError):
            raise ValueError("not an IANA time zone, such as America/Chicago") from None
        return value

    def find_authority(self, text: str) -> str | None:
        """Canonical name of an assigning authority given by any of its spellings; empty text means the default."""
        if not text:
            return self.default_authority
        for authority in self.authorities:
            if text == authority.name or text in authority.aliases:
                return authority.name
        return None


class PatientRule(Strict):
    """Where an account's events carry the patient."""

    metadata_key: str = Field(default="mrn", description="Metadata member that holds the patient's identifier.")
    id_type: Literal["MR", "AN", "VN"] = Field(default="MR", description="HL7 table 0203 type of that identifier.")
    authority_key: str | None = Field(
        default="assigning_authority",
        description="Metadata member that may name the assigning authority; absent means the facility's default.",
    )
    visit_key: str | None = Field(default="visit", description="Metadata member of the visit number.")
    guarantor_key: str | None = Field(
        default="guarantor_account", description="Metadata member of the guarantor account."
    )
    invoice_key: str | None = Field(default="invoice", description="Metadata member of the invoice.")
    claim_key: str | None = Field(default="claim", description="Metadata member of the claim.")


class Account(Strict):
    """One account at a payment gateway, tied to one facility."""

    name: Name = Field(description="Last part of the webhook address: `/webhooks/SOURCE/NAME`.")
    source: Name = Field(description="The gateway connector, for example `stripe`.")
    facility: Name = Field(description="Facility whose money this account takes.")
    secrets: tuple[SecretStr, ...] = Field(
        min_length=1, max_length=2, description="Webhook signing secrets; two while one is being rotated out."
    )
    tolerance_seconds: int = Field(
        default=300, ge=10, le=3600, description="Oldest signature time that is accepted, in seconds."
    )
    patient: PatientRule = PatientRule()


class Feed(Strict):
    """One sender of HL7 v2 messages, recognised by MSH-3 and MSH-4."""

    name: Name = Field(description="Name of the feed; its records are in order under this key.")
    facility: Name = Field(description="Facility whose patients this feed tells of.")
    sending_application: str = Field(description="MSH-3 of its messages.")
    sending_facility: str = Field(description="MSH-4 of its messages.")


class Tenancy(Strict):
    """The whole domain part: one tenant."""

    tenant: Name
    facilities: tuple[Facility, ...] = Field(min_length=1)
    accounts: tuple[Account, ...] = ()
    feeds: tuple[Feed, ...] = ()

    def get_facility(self, facility_id: str) -> Facility:
        """The facility of that id; ``KeyError`` when there is none (the settings check refuses such a file)."""
        for facility in self.facilities:
            if facility.id == facility_id:
                return facility
        raise KeyError(facility_id)

    def find_account(self, source: str, name: str) -> Account | None:
        """The account of that name at that gateway."""
        for account in self.accounts:
            if account.source == source and account.name == name:
                return account
        return None
