"""Admissions: HL7 messages of one run, and what each must make of which identifier, in the order of the feed."""

from __future__ import annotations

from tests.crash_points.traffic import Planned

ALWAYS = "M-always"
"""A record number that every run merges and opens again."""


def _name(authority, value, id_type="MR"):
    return f"{authority}|{id_type}|{value}"


def _build(event, control_id, *segments):
    head = rf"MSH|^~\&|EPICADT|LSNORTH|REMITSTREAM|LAKESHORE|20260101120000||ADT^{event}|{control_id}|P|2.5.1"
    return "\r".join([head, "EVN||20260101120000", *segments, ""]).encode()


def plan(run):
    """The messages of one run, in order: each depends on those before it."""
    first, second = f"M-{run}-first", f"M-{run}-second"

    def pid(value, account=""):
        return f"PID|1||{value}^^^LSNORTH^MR||DOE^{run}" + (f"|||||||||||||{account}" if account else "")

    def active(value):
        return (_name("NORTH", value), "active", "")

    def merged(value):
        return (_name("NORTH", value), "merged", _name("NORTH", first))

    admit = _build("A04", f"{run}-1", pid(first, f"A-{run}"))
    merge = _build("A40", f"{run}-5", pid(first), f"MRG|{second}^^^LSNORTH^MR~{ALWAYS}^^^LSNORTH^MR")
    account = (_name("NORTH", f"A-{run}", "AN"), "active", "")

    def make(body, fate, *states, **others):
        return Planned("north-adt", body, fate, states=states, **{"account": "north-adt", **others})

    return [
        make(admit, "patient_update", active(first), account),
        make(_build("A04", f"{run}-2", pid(second)), "patient_update", active(second)),
        make(_build("A08", f"{run}-3", "PID|1||X^^^NOWHERE^MR"), "dead_lettered"),
        make(admit, "suppressed"),
        make(merge, "patient_update", active(first), merged(second), merged(ALWAYS)),
        # A late update ends the merge, and the next merge comes after it.
        make(_build("A08", f"{run}-6", pid(second)), "patient_update", active(second)),
        make(
            _build("A40", f"{run}-7", pid(first), f"MRG|{second}^^^LSNORTH^MR"),
            "patient_update",
            active(first),
            merged(second),
        ),
        make(merge, "suppressed"),
        make(_build("A03", f"{run}-8", pid(first)), "ignored"),
        make(_build("A08", f"{run}-9", pid(ALWAYS)), "patient_update", active(ALWAYS)),
        # The same control id and number from another house is another patient.
        make(
            _build("A04", f"{run}-1", f"PID|1||{first}^^^LSHARBOR^MR"),
            "patient_update",
            (_name("HARBOR", first), "active", ""),
            account="harbor-adt",
            facility="harbor",
        ),
    ]


class Admissions:
    """The traffic of ``raw.hl7``."""

    source = "hl7"
    stores = ("seen",)
    held = 0

    def __init__(self):
        self.plan = plan

    def prepare(self, run):
        """Nothing comes before."""

    def close(self):
        """Nothing is open."""
