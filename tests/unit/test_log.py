"""The log shows event names and keys; payload, PHI, secrets and card data never get through."""

import contextlib
import dataclasses
import io
import json
import logging
import sys
import threading
import warnings

import msgspec
import pytest
import structlog
from pydantic import SecretStr

from schemas.failure import Failure, FailureKind, TemporaryError
from telemetry.log import configure, get_log
from telemetry.masking import is_sensitive

CARD = "4242424242424242"  # a payment network's published test number
PERSON = "Quillfeather"


@pytest.fixture(autouse=True)
def _restore():
    hooks = sys.excepthook, threading.excepthook
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    yield
    sys.excepthook, threading.excepthook = hooks
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


@pytest.fixture
def stream():
    return io.StringIO()


def read(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def raise_with(text):
    raise ValueError(text)


def test_a_line_is_an_event_with_its_keys(stream):
    configure("info", "json", stream=stream)
    get_log("receiver").info("delivery_accepted", source="stripe", records=3)
    get_log("receiver").debug("not_shown")
    (line,) = read(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "info",
        "event": "delivery_accepted",
        "component": "receiver",
        "source": "stripe",
        "records": 3,
    }


LEAKS = {
    "mrn": {"mrn": PERSON},
    "patient key": {"patient_family": PERSON},
    "name": {"name": PERSON},
    "camel case": {"patientId": PERSON},
    "nested": {"facts": [{"lastName": PERSON}]},
    "bytes": {"record": PERSON.encode()},
    "bytearray in a tuple": {"record": (bytearray(PERSON.encode()),)},
    "exception as a value": {"reason": ValueError(PERSON)},
    "secret type": {"setting": SecretStr(PERSON)},
    "segment": {"message": f"PID|1||77^^^NORTH||{PERSON}^Ada"},
    "segment in bytes text": {"message": f"b'MSH|^~\\\\&|{PERSON}"},
    "person as a key": {"counts": {f"PID|{PERSON}": 1}},
    "bearer": {"header": f"Bearer {PERSON}{PERSON}"},
    "url with credentials": {"endpoint": f"redis://svc:{PERSON}@10.0.0.1:6379"},
    "unknown object": {"thing": dataclasses.make_dataclass("Thing", ["x"])(PERSON)},
    "struct": {"thing": msgspec.defstruct("Event", ["x"])(PERSON)},
    "card": {"note": f"charge of {CARD} {PERSON}"},
    "card with spaces": {"note": f"4242 4242 4242 4242 {PERSON}"},
}


@pytest.mark.parametrize("members", LEAKS.values(), ids=LEAKS.keys())
@pytest.mark.parametrize("form", ["json", "console"])
def test_nothing_sensitive_is_shown(stream, members, form):
    configure("info", form, stream=stream)
    get_log("worker").info("record_seen", **members)
    shown = stream.getvalue()
    assert "record_seen" in shown
    assert PERSON not in shown
    assert CARD not in shown


@pytest.mark.parametrize("leak", sorted(LEAKS.keys() - {"secret type"}))  # that one hides itself
def test_the_same_search_finds_all_of_it_with_masking_off(stream, leak):
    configure("info", "json", masking=False, stream=stream)
    get_log("worker").info("record_seen", **LEAKS[leak])
    assert PERSON in stream.getvalue()


def test_card_numbers_are_masked_as_text_and_as_number(stream):
    configure("info", "json", stream=stream)
    get_log("worker").info("record_seen", number=int(CARD), numbers=[int(CARD)], offset=1_700_000_000_123)
    assert CARD not in stream.getvalue()
    assert read(stream)[0]["offset"] == 1_700_000_000_123


def test_a_sentence_is_not_an_event(stream):
    configure("info", "json", stream=stream)
    get_log("worker").info(f"Posting for {PERSON}")
    assert PERSON not in stream.getvalue()
    assert read(stream)[0]["event"] == "unnamed_event"


def test_exceptions_show_type_place_and_causes_never_their_text(stream):
    configure("info", "json", stream=stream)
    try:
        try:
            raise_with(PERSON)
        except ValueError as error:
            raise KeyError(PERSON) from error
    except KeyError:
        get_log("worker").exception("record_failed")
    (line,) = read(stream)
    assert PERSON not in stream.getvalue()
    assert line["error"] == "KeyError"
    assert line["causes"] == ["ValueError"]
    assert line["place"].startswith("test_log.py:")
    assert line["level"] == "error"


def test_our_own_errors_show_their_codes(stream):
    configure("info", "json", stream=stream)
    get_log("worker").warning("paused", exc_info=TemporaryError("no answer.", place="localhost:1"))
    get_log("worker").warning("refused", exc_info=Failure(FailureKind.INVALID, "AMOUNT_MISSING", "amount"))
    first, second = read(stream)
    assert (first["code"], first["setting"], first["detail"]) == ("RS200", "localhost:1", "no answer.")
    assert (second["kind"], second["code"], second["field"]) == ("INVALID", "AMOUNT_MISSING", "amount")


def log_arguments(logger):
    logger.warning("event %s of %r took %d", PERSON, {"x": PERSON}, 7)


def log_formatted(logger):
    logger.warning(f"crashed on '{PERSON}' reason={PERSON}")  # noqa: G004 - as libraries do


def log_lines(logger):
    logger.error(f"Task exception was never retrieved\nfuture: <Task exception=ValueError({PERSON})>")  # noqa: G004


def log_exception(logger):
    try:
        raise_with(PERSON)
    except ValueError:
        logger.exception("crashed")


def log_bad_arguments(logger):
    logger.warning("%d records", PERSON)


@pytest.mark.parametrize("speak", [log_arguments, log_formatted, log_lines, log_exception, log_bad_arguments])
@pytest.mark.parametrize("name", ["faust.agents", "mode", "asyncio", "aiohttp.access"])
def test_lines_of_libraries_keep_their_place_but_lose_their_payload(stream, speak, name):
    configure("info", "json", stream=stream)
    speak(logging.getLogger(name))
    (line,) = read(stream)
    assert PERSON not in stream.getvalue()
    assert line["event"] == "library_message"
    assert line["component"] == name


@pytest.mark.parametrize("speak", [log_arguments, log_formatted, log_lines])
def test_masking_off_shows_what_libraries_said(stream, speak):
    configure("info", "json", masking=False, stream=stream)
    speak(logging.getLogger("faust.agents"))
    assert PERSON in stream.getvalue()


def test_messages_about_connections_are_kept(stream):
    configure("info", "json", stream=stream)
    logging.getLogger("kafka").warning("%s [%s] %s", "FAIL", "rdkafka#1", "localhost:9092: Connection refused")
    logging.getLogger("faust").warning("took %d of %s", 7, PERSON)
    first, second = read(stream)
    assert "localhost:9092: Connection refused" in first["text"]
    assert second["arguments"] == [7]


def test_warnings_go_the_same_way(stream):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure("info", "json", stream=stream)
        warnings.warn(f"odd value '{PERSON}'", stacklevel=1)
    assert PERSON not in stream.getvalue()
    assert read(stream)[0]["component"] == "py.warnings"


def test_uncaught_exceptions_are_named_without_their_text(stream):
    configure("info", "json", stream=stream)
    thread = threading.Thread(target=raise_with, args=(PERSON,))
    thread.start()
    thread.join()
    with contextlib.suppress(ValueError):
        try:
            raise_with(PERSON)
        except ValueError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    lines = read(stream)
    assert [(line["event"], line["error"]) for line in lines] == [("uncaught_exception", "ValueError")] * 2
    assert PERSON not in stream.getvalue()


def test_a_closed_stream_does_not_stop_the_caller(stream):
    configure("info", "json", stream=stream)
    stream.close()
    get_log("worker").info("record_seen")
    logging.getLogger("faust").warning("hello")


def test_configuring_twice_does_not_double_lines(stream):
    configure("info", "json", stream=io.StringIO())
    configure("info", "json", stream=stream)
    logging.getLogger("faust").warning("once")
    assert len(read(stream)) == 1


@pytest.mark.parametrize("key", ["mrn", "hmac_key", "api_key", "webhookSecret", "first_name", "MRN", "card_number"])
def test_sensitive_keys(key):
    assert is_sensitive(key)


@pytest.mark.parametrize(
    "key", ["source", "topic_name", "key", "partition", "patients", "patient_update", "offset", ""]
)
def test_keys_that_may_be_shown(key):
    assert not is_sensitive(key)
