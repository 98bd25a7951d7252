"""Bad input at the edges of real processes: refused and counted, or kept with its reason; never a loss, never a leak.

The four roles run once for the whole file; each test looks at what its own input changed.
"""

import json
import time
import uuid

import pytest

pytestmark = pytest.mark.integration

CARD = "4111111111111111"
CARD_SPACED = "5555 5555 5555 4444"
TRACK = "%B4111111111111111^WREN/ODALYS^29121010000000000000?"
SECURITY_CODE = "7391"
REASONS = ("stage", "kind", "code", "field", "time")
LIMIT = 65_536


def build_payment(mrn="N1", *, kind="payment_intent.succeeded", **members):
    """A Stripe event with ids of its own; ``members`` replace those of the payment intent."""
    number = uuid.uuid4().hex[:16]
    intent = {
        "id": f"pi_{number}",
        "object": "payment_intent",
        "amount": 12500,
        "amount_received": 12500,
        "currency": "usd",
        "status": "succeeded",
        "metadata": {"mrn": mrn},
    } | members
    return json.dumps(
        {
            "id": f"evt_{number}",
            "object": "event",
            "created": int(time.time()),
            "type": kind,
            "data": {"object": intent},
        }
    ).encode()


def build_admission(mrn, *, control_id=None, authority="NORTH", sender="LSNORTH", note="", pid3=None):
    """An ADT^A04. ``pid3`` replaces the whole field."""
    field = f"{mrn}^^^{authority}^MR" if pid3 is None else pid3
    header = f"MSH|^~\\&|EPICADT|{sender}|REMITSTREAM|LAKESHORE|20260301120000+0000||ADT^A04^ADT_A01"
    lines = [
        f"{header}|{control_id or uuid.uuid4().hex[:16]}|P|2.5.1",
        "EVN|A04|20260301120000+0000",
        f"PID|1||{field}||WREN^ODALYS",
        *([f"NTE|1||{note}"] if note else []),
    ]
    return ("\r".join(lines) + "\r").encode()


def read_code(answers):
    """MSA-1 of the only answer."""
    (segment,) = [part for part in answers.split(b"\r") if part.startswith(b"MSA")]
    return segment.split(b"|")[1].decode()


FATES = ("canonical", "suppressed", "ignored", "patient_update", "waiting", "in_review", "dead_lettered")


class Site:
    """The running roles, what each test changed, and what all of them together must have led to."""

    def __init__(self, deployment, world):
        self.deployment, self.world = deployment, world
        self.expected = dict.fromkeys(FATES, 0)
        self.letters = {}

    def mark(self):
        """What comes from now on is the next test's."""
        self.letters = self.world.read_ends("dlq")
        return self

    def count_fates(self):
        """What became of the records so far, as the worker counts; the account asks the topics at the end."""
        counts = dict.fromkeys(FATES, 0)
        for labels, value in self.world.list_metrics("worker", "records_total").items():
            counts[dict(labels)["fate"]] += value
        return counts

    def settle(self, **changes):
        """Wait until all is decided; check that exactly these fates grew and nothing else was published."""
        for fate, count in changes.items():
            self.expected[fate] += count
        total = sum(self.expected.values())
        self.deployment.wait_until(lambda: sum(self.count_fates().values()) >= total, "records are not decided")
        assert self.count_fates() == self.expected
        assert sum(self.count_raw().values()) == total

    def count_raw(self):
        return {name: sum(self.world.read_ends(name).values()) for name in ("raw.stripe", "raw.hl7")}

    def take_letter(self):
        """The one dead letter that came since ``mark``, and its reasons."""
        (letter,) = self.world.read_topic("dlq", self.letters)
        headers = {name: value.decode() for name, value in letter.headers()}
        return letter, {name: headers[f"dead_letter_{name}"] for name in REASONS}

    def find_raw(self, letter):
        """The raw record that a dead letter is made of."""
        headers = dict(letter.headers())
        hop = headers["hop"].decode()
        for record in self.world.read_topic(f"raw.{headers['source'].decode()}"):
            if hop.endswith(f":{record.partition()}:{record.offset()}"):
                return record
        raise AssertionError(f"no raw record {hop}")


@pytest.fixture(scope="module")
def running(deploy_for_module, outside):
    deployment = deploy_for_module(receiver__max_body_bytes=str(LIMIT))
    for command in ("receive", "listen", "project", "worker"):
        deployment.start(command)
    for role in ("receiver", "listener", "projector", "worker"):
        deployment.await_ready(role)
    world = outside(deployment)
    assert read_code(world.send_hl7(build_admission("N1"))) == "AA"
    site = Site(deployment, world)
    site.settle(patient_update=1)
    # Its patient must be known before payments come.
    deployment.wait_until(lambda: world.read_metric("projector", "projection_applied_total") == 1, "nobody is known")
    return site


@pytest.fixture
def site(running):
    return running.mark()


# ---------------------------------------------------------------- webhooks that are refused


def refuse(name):
    """(arguments of ``post``, status, source label, reason label) of one refusal."""
    body = build_payment()
    return {
        "another key": lambda w: ({"signature": w.sign(body, secret=b"whsec_guess")}, 401, "stripe", "signature_wrong"),
        "another account's key": lambda w: (
            {"signature": w.sign(body, account="harbor-card")},
            401,
            "stripe",
            "signature_wrong",
        ),
        "other bytes": lambda w: ({"signature": w.sign(body + b" ")}, 401, "stripe", "signature_wrong"),
        "no signature": lambda _: ({}, 401, "stripe", "signature_missing"),
        "half a signature": lambda _: ({"signature": "t=1,v0=aa"}, 401, "stripe", "signature_malformed"),
        "an old timestamp": lambda w: ({"signature": w.sign(body, age=400)}, 401, "stripe", "timestamp_stale"),
        "a future timestamp": lambda w: ({"signature": w.sign(body, age=-400)}, 401, "stripe", "timestamp_stale"),
        "an unknown account": lambda w: (
            {"path": "/webhooks/stripe/south-card", "signature": w.sign(body)},
            404,
            "unknown",
            "unknown_account",
        ),
        "an unknown source": lambda w: (
            {"path": "/webhooks/adyen/north-card", "signature": w.sign(body)},
            404,
            "unknown",
            "unknown_account",
        ),
    }[name], body


@pytest.mark.parametrize(
    "name",
    [
        "another key",
        "another account's key",
        "other bytes",
        "no signature",
        "half a signature",
        "an old timestamp",
        "a future timestamp",
        "an unknown account",
        "an unknown source",
    ],
)
def test_a_refused_webhook_is_counted_and_never_published(site, name):
    build, body = refuse(name)
    arguments, status, source, reason = build(site.world)
    counted = site.world.read_metric("receiver", "refused_total", source=source, reason=reason)
    assert site.world.post(body, **arguments)[0] == status
    assert site.world.read_metric("receiver", "refused_total", source=source, reason=reason) == counted + 1
    site.settle()


@pytest.mark.parametrize("chunked", [False, True], ids=["declared length", "no length"])
def test_a_body_over_the_limit_is_413(site, chunked):
    body = build_payment(description="x" * LIMIT)
    pieces = (body[at : at + 8192] for at in range(0, len(body), 8192))
    counted = site.world.read_metric("receiver", "refused_total", source="stripe", reason="too_large")
    answer = site.world.post(pieces if chunked else body, signature=site.world.sign(body))
    assert answer[0] == 413
    assert site.world.read_metric("receiver", "refused_total", source="stripe", reason="too_large") == counted + 1
    site.settle()


def test_a_good_webhook_beside_them_is_canonical(site):
    """The oracle of the refusals above: the same sender, rightly signed, is taken."""
    assert site.world.deliver(build_payment()) == 200
    site.settle(canonical=1)


# ---------------------------------------------------------------- webhooks that are kept with a reason


@pytest.mark.parametrize(
    ("body", "code", "kind"),
    [
        (b'{"id":"evt_cut","data":{"object":{"id":"pi_OWLFEATHER', "BODY_INVALID", "INVALID"),
        (b"OWLFEATHER\xff\xfe\x00 is no JSON", "BODY_INVALID", "INVALID"),
        (build_payment(amount_received=None, description="OWLFEATHER"), "AMOUNT_MISSING", None),
        (build_payment(currency="owl", statement_descriptor="OWLFEATHER"), "UNKNOWN_CURRENCY", None),
        (build_payment(metadata={"mrn": "N1", "assigning_authority": "OWLFEATHER"}), "AUTHORITY_UNKNOWN", "INVALID"),
    ],
    ids=["cut JSON", "binary", "no amount", "no such currency", "no such authority"],
)
def test_what_cannot_be_read_is_answered_200_and_one_dead_letter(site, body, code, kind):
    """A well signed delivery is never refused for its content: the sender would only send it again."""
    assert site.world.deliver(body) == 200
    site.settle(dead_lettered=1)
    letter, reasons = site.take_letter()
    assert reasons["code"] == code
    assert kind is None or reasons["kind"] == kind
    assert reasons["stage"] == "normalise"
    assert "OWLFEATHER" not in str(reasons)
    raw = site.find_raw(letter)
    assert (letter.key(), letter.value()) == (raw.key(), raw.value())
    kept = dict(letter.headers())
    assert all(kept[name] == value for name, value in raw.headers())
    if code == "BODY_INVALID":
        assert letter.value() == body
    assert site.world.read_metric("worker", "dead_letters_total", stage="normalise", code=code) >= 1


def test_an_unknown_event_type_is_counted_and_kept_raw(site):
    body = build_payment(kind="lunar_phase.changed")
    assert site.world.deliver(body) == 200
    site.settle(ignored=1)
    kept = [record for record in site.world.read_topic("raw.stripe") if record.value() == body]
    assert len(kept) == 1
    labels = {"source": "stripe", "fate": "ignored", "reason": "UNKNOWN_TYPE"}
    assert site.world.read_metric("worker", "records_total", **labels) == 1


def test_the_same_event_twice_is_one_payment(site):
    body = build_payment()
    assert [site.world.deliver(body), site.world.deliver(body)] == [200, 200]
    site.settle(canonical=1, suppressed=1)


def test_another_amount_under_the_same_id_is_a_question_for_a_person(site):
    first = build_payment()
    second = first.replace(b"12500", b"99900")
    assert [site.world.deliver(first), site.world.deliver(second)] == [200, 200]
    site.settle(canonical=1, in_review=1)


# ---------------------------------------------------------------- HL7


def test_a_sender_that_nobody_named_is_refused(site):
    counted = site.world.read_metric("listener", "refused_total", source="hl7", reason="unknown_sender")
    assert read_code(site.world.send_hl7(build_admission("N7", sender="ELSEWHERE"))) == "AR"
    assert site.world.read_metric("listener", "refused_total", source="hl7", reason="unknown_sender") == counted + 1
    site.settle()


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"garbage before\x0b", "garbage"),
        (b"\x0b" + build_admission("N8")[:80], "cut"),
        (build_admission("N8"), "garbage"),
    ],
    ids=["bytes before the frame", "cut in the middle", "no frame at all"],
)
def test_bad_framing_is_counted_and_never_published(site, stream, reason):
    counted = site.world.read_metric("listener", "mllp_framing_errors_total", reason=reason)
    assert site.world.send_hl7(stream, framed=False) == b""
    site.deployment.wait_until(
        lambda: site.world.read_metric("listener", "mllp_framing_errors_total", reason=reason) > counted,
        "the framing error is not counted",
    )
    site.settle()


def test_a_message_after_bad_framing_is_still_taken(site):
    message = b"noise\x0b" + build_admission("N9") + b"\x1c\r"
    assert read_code(site.world.send_hl7(message, framed=False)) == "AA"
    site.settle(patient_update=1)


def test_a_message_without_a_header_is_not_answered(site):
    counted = site.world.read_metric("listener", "refused_total", source="hl7", reason="header_unreadable")
    assert site.world.send_hl7(b"PID|1||N1^^^NORTH^MR\r") == b""
    assert site.world.read_metric("listener", "refused_total", source="hl7", reason="header_unreadable") == counted + 1
    site.settle()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (build_admission("", pid3=""), "PATIENT_ID_MISSING"),
        (build_admission("N5", authority="STRANGE"), "AUTHORITY_UNKNOWN"),
        (build_admission("", pid3=f"{CARD}^^^NORTH^MR"), "PAN_IN_REFERENCE"),
    ],
    ids=["no PID-3", "wrong authority", "card number as patient"],
)
def test_an_admission_that_names_nobody_is_acknowledged_and_one_dead_letter(site, message, code):
    assert read_code(site.world.send_hl7(message)) == "AA"
    site.settle(dead_lettered=1)
    letter, reasons = site.take_letter()
    assert (reasons["code"], reasons["kind"], reasons["stage"]) == (code, "INVALID", "normalise")
    raw = site.find_raw(letter)
    assert (letter.key(), letter.value()) == (raw.key(), raw.value()) == (b"north-adt", raw.value())
    if code != "PAN_IN_REFERENCE":
        assert letter.value() == message


def test_a_repeated_message_gets_the_same_answer_and_changes_nothing(site):
    message = build_admission("N10")
    first, second = site.world.send_hl7(message), site.world.send_hl7(message)
    assert first == second
    assert read_code(first) == "AA"
    site.settle(patient_update=1, suppressed=1)


# ---------------------------------------------------------------- card data


def test_card_data_in_a_webhook_is_redacted_and_counted(site):
    body = build_payment(
        description=f"card {CARD}",
        metadata={"mrn": "N1", "note": f"paid with {CARD_SPACED}", "swipe": TRACK, "marker": "SEARCHABLE"},
        payment_method_details={"card": {"cvc": SECURITY_CODE}},
    )
    counted = {
        kind: site.world.read_metric("receiver", "redactions_total", source="stripe", kind=kind)
        for kind in ("card", "track", "security_code", "member")
    }
    assert site.world.deliver(body) == 200
    site.settle(canonical=1)
    assert {
        kind: site.world.read_metric("receiver", "redactions_total", source="stripe", kind=kind) - before
        for kind, before in counted.items()
    } == {"card": 1, "track": 1, "security_code": 1, "member": 1}


def test_card_data_in_an_admission_is_redacted_and_counted(site):
    counted = site.world.read_metric("listener", "redactions_total", source="hl7", kind="card")
    message = build_admission("N11", note=f"SEARCHABLE card {CARD_SPACED} and {CARD}")
    assert read_code(site.world.send_hl7(message)) == "AA"
    site.settle(patient_update=1)
    assert site.world.read_metric("listener", "redactions_total", source="hl7", kind="card") == counted + 1


def test_a_card_number_as_patient_of_a_payment_is_a_dead_letter(site):
    assert site.world.deliver(build_payment(mrn=CARD)) == 200
    site.settle(dead_lettered=1)
    letter, reasons = site.take_letter()
    assert reasons["code"] == "PAN_IN_REFERENCE"
    assert CARD.encode() not in letter.value()


def test_a_card_number_as_object_id_is_a_dead_letter(site):
    """Ids become keys and headers: both are searched below."""
    assert site.world.deliver(build_payment(id=CARD, metadata={"mrn": "N1", "marker": "SEARCHABLE"})) == 200
    site.settle(dead_lettered=1)
    assert site.take_letter()[1]["code"] == "PAN_IN_REFERENCE"


# ---------------------------------------------------------------- after all of it


def test_the_account_balances_and_every_metric_is_known(running):
    """Of everything that the tests above sent; they may run alone or in any order."""
    account = running.deployment.await_account(lambda found: not found.raw.pending)
    assert account.raw.parts == running.expected
    assert account.balanced
    assert account.lost == 0
    assert account.raw.doubled == 0
    for role in ("receiver", "listener", "projector", "worker"):
        assert running.world.list_metrics(role, "metric_misuse_total") == {}, role


def test_no_topic_holds_card_data(running):
    """Keys, values and headers of every topic, also of dead letters and changelogs."""
    needles = [CARD, CARD_SPACED, CARD_SPACED.replace(" ", ""), TRACK, f'"{SECURITY_CODE}"', "SEARCHABLE"]
    found = {needle: set() for needle in needles}
    for topic in running.world.list_topics():
        for message in running.world.read_topic(topic):
            parts = [message.key() or b"", message.value() or b"", *(value for _, value in message.headers() or ())]
            for needle in needles:
                if any(needle.encode() in part for part in parts):
                    found[needle].add(topic)
    # The search finds what is there: other texts of the same events.
    assert found.pop("SEARCHABLE") >= {"raw.stripe", "raw.hl7", "dlq"}
    assert found == {needle: set() for needle in needles[:-1]}


def test_logs_hold_nothing_of_the_payloads(running):
    texts = {log.name: log.read_text("utf-8") for log in running.deployment.folder.glob("*.log")}
    assert set(texts) == {"receive.log", "listen.log", "project.log", "worker.log"}
    secrets = [running.world.find_secret(name).decode() for name in ("north-card", "harbor-card", "valley-card")]
    for name, text in texts.items():
        assert "starting" in text, name
        for needle in (CARD, CARD_SPACED, "WREN", "ODALYS", "OWLFEATHER", "SEARCHABLE", "N1^^^", *secrets):
            assert needle not in text, name
