"""HL7 v2 admissions: patient identifiers and merges, as hospitals' ADT interfaces send them.

Received by ``sources.listener``, read by ``streams.admissions``. What each event means: HL7 2.5.1 chapter 3.
"""

from __future__ import annotations

from types import MappingProxyType

from sources.contract import Status
from sources.ehr import FeedConnector

FEED = FeedConnector(
    name="hl7",
    display_name="HL7 v2 ADT",
    status=Status.SANDBOX,
    documentation="https://www.hl7.org/implement/standards/product_brief.cfm?product_id=144",
    transport="MLLP (TCP or TLS), acknowledged after the durable write, original and enhanced mode",
    messages=MappingProxyType(
        {
            "ADT^A01": "Admission: the patient's identifiers are written as active.",
            "ADT^A04": "Registration: the same.",
            "ADT^A08": "Patient update: the same; a merged identifier named again is active again.",
            "ADT^A28": "Person added: the same as A01.",
            "ADT^A31": "Person update: the same as A08.",
            "ADT^A40": "Merge: each identifier of MRG-1 points to the survivor in PID-3.",
        }
    ),
)
