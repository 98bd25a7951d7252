"""What every target connector must keep, by its fixtures in ``tests/fixtures/targets/<name>/``.

A new target inherits these tests by having a file in ``sinks/targets/`` and fixtures; nothing is edited here. Those of
a folder of one's own are tested when the setting that names it is in the environment
(``REMITSTREAM_CONNECTORS__TARGETS``): their mappings lie beside them, their fixtures in ``fixtures/<name>/``.
"""

import ast
import json
import logging
import os
import re
from pathlib import Path

import msgspec
import pytest
from pydantic import ValidationError

from schemas.events import Kind, MoneyEvent, Reference
from schemas.failure import Failure, FailureKind
from schemas.mapping import check_files
from schemas.money import Money
from schemas.tenancy import Authority, Facility
from sinks.attempts import Entry, decode_entry, encode_entry
from sinks.catalog import discover
from sinks.contract import Answer, HttpResponse, PostingContext, TargetClass, Unclear
from sinks.ledger import Ledger
from sinks.policy import Policy
from sinks.transport import judge_response, read_completion, read_finding

ROOT = Path(__file__).parents[2]
OWN = Path(os.environ["REMITSTREAM_CONNECTORS__TARGETS"]) if "REMITSTREAM_CONNECTORS__TARGETS" in os.environ else None
TARGETS = discover(OWN)
OVER_HTTP = [name for name, target in TARGETS.items() if target.transport == "http"]
WITH_LOOK_UP = [name for name in OVER_HTTP if TARGETS[name].http.look_up is not None]
NOW = 1_772_355_606.0  # Sun, 01 Mar 2026 09:00:06 GMT


def find_parts(name):
    """The target's file, its mapping and its fixtures."""
    if OWN is not None and (OWN / f"{name}.py").exists():
        return OWN / f"{name}.py", OWN / f"{name}.yaml", OWN / "fixtures" / name
    return (
        ROOT / "sinks" / "targets" / f"{name}.py",
        ROOT / "sinks" / "mappings" / f"{name}.yaml",
        ROOT / "tests" / "fixtures" / "targets" / name,
    )


def find_fixtures(name):
    return find_parts(name)[2]


def read_cases(kind):
    return [
        pytest.param(name, json.loads(path.read_text("utf-8")), id=f"{name}-{path.stem}")
        for name in TARGETS
        for path in sorted((find_fixtures(name) / kind).glob("*.json"))
    ]


def build_settings(name, overrides=None):
    given = json.loads((find_fixtures(name) / "settings.json").read_text("utf-8"))
    return TARGETS[name].settings.model_validate(given | (overrides or {}))


def build_context(case):
    context = case["context"]
    mrn = Reference(**context["mrn"])
    facility = Facility(
        id=case["event"]["facility"],
        time_zone=context["time_zone"],
        default_authority=mrn.authority,
        authorities=(Authority(name=mrn.authority),),
    )
    return PostingContext(facility, mrn, context["frozen_at"], context.get("generation", 0))


def freeze(name, case):
    event = msgspec.convert(case["event"], MoneyEvent)
    settings = build_settings(name, case["settings"])
    assert TARGETS[name].routes(event, settings)
    return TARGETS[name].freeze(event, build_context(case), settings), settings


def judge(name, answer, request, settings, *, status=200, headers=None):
    """The answer's meaning, as the target's transport reads it."""
    target = TARGETS[name]
    if target.transport == "http":
        return judge_response(target.http, HttpResponse(status, headers or {}, answer), request, settings, now=NOW)
    return target.verdict(answer, request, settings)


def first_case(name):
    return next(case.values[1] for case in read_cases("requests") if case.values[0] == name)


def find_case(name, stem):
    if stem is None:
        return first_case(name)
    return json.loads((find_fixtures(name) / "requests" / f"{stem}.json").read_text("utf-8"))


def fill(text, request):
    """What a fixture cannot know: keys of ours."""
    for place, value in (
        ("control_id", request.control_id),
        ("reference", request.reference),
        ("root", request.reference.partition("-")[0]),
    ):
        text = text.replace(f"{{{place}}}", value)
    return text


def build_response(page, request):
    answer = page["answer"] if isinstance(page["answer"], str) else json.dumps(page["answer"])
    return HttpResponse(page["status"], page.get("headers", {}), fill(answer, request).encode())


@pytest.mark.parametrize("name", TARGETS)
def test_each_claimed_capability_has_a_fixture(name):
    proved = {case.values[1]["capability"] for kind in ("requests", "answers") for case in read_cases(kind)
              if case.values[0] == name}  # fmt: skip
    assert set(TARGETS[name].capabilities) <= proved


@pytest.mark.parametrize(("name", "case"), read_cases("requests"))
def test_the_request_is_the_one_written_by_hand(name, case):
    request, _ = freeze(name, case)
    wanted = fill("\n".join(case["request"]), request)
    assert request.body.decode("utf-8").rstrip("\r\n").replace("\r\n", "\n").replace("\r", "\n") == wanted
    assert request.method == case.get("method", "")
    assert request.url == fill(case.get("url", ""), request)
    wanted_headers = [[header, fill(value, request)] for header, value in case.get("headers", [])]
    assert [list(header) for header in request.headers] == wanted_headers


@pytest.mark.parametrize(("name", "case"), read_cases("requests"))
def test_the_key_is_a_function_of_event_and_instance_alone(name, case):
    request, _ = freeze(name, case)
    later = {**case, "context": {**case["context"], "frozen_at": case["context"]["frozen_at"] + 86_400_000}}
    assert freeze(name, later)[0].control_id == request.control_id
    assert freeze(name, later)[0].reference == request.reference
    other_event = {**case, "event": {**case["event"], "event_id": "f" * 32}}
    differences = find_fixtures(name) / "another.json"
    another = json.loads(differences.read_text("utf-8")) if differences.exists() else {"name": "another"}
    other_instance = {**case, "settings": {**case["settings"], **another}}
    for other in (other_event, other_instance):
        assert freeze(name, other)[0].control_id != request.control_id
    assert freeze(name, other_event)[0].reference != request.reference
    assert freeze(name, case)[0] == request


@pytest.mark.parametrize(("name", "case"), read_cases("requests"))
def test_a_redrive_has_another_key_where_a_key_is_remembered_and_never_another_reference(name, case):
    requests = []
    for generation in range(3):
        request, settings = freeze(name, {**case, "context": {**case["context"], "generation": generation}})
        requests.append(request)
    assert len({request.reference for request in requests}) == 1
    keys = {request.control_id for request in requests}
    target_class = TARGETS[name].classify(settings)
    if target_class is TargetClass.A:
        assert len(keys) == 3
    if target_class is TargetClass.B:
        assert len(keys) == 1, "it names the record that is written"


@pytest.mark.parametrize("minor", [0, -1, -1250])
@pytest.mark.parametrize(("name", "case"), read_cases("requests"))
def test_an_amount_that_is_no_amount_is_not_posted(name, case, minor):
    event = {**case["event"], "money": {**case["event"]["money"], "minor": minor}}
    with pytest.raises(Failure) as caught:
        freeze(name, {**case, "event": event})
    assert (caught.value.kind, caught.value.code) == (FailureKind.INVALID, "AMOUNT_NOT_POSITIVE")


@pytest.mark.parametrize(("name", "case"), read_cases("answers"))
def test_the_answer_means_what_it_must(name, case):
    settings = build_settings(name, case["settings"])
    request, _ = freeze(name, find_case(name, case.get("request")))
    text = fill("\r".join(case["answer"]), request)
    reply = {part: case[part] for part in ("status", "headers") if part in case}
    answer = judge(name, text.encode() + b"\r", request, settings, **reply)
    assert answer.kind == (FailureKind(case["kind"]) if case["kind"] else None)
    assert answer.code == case["code"]
    assert answer.reference == case.get("reference", "")


@pytest.mark.parametrize(("name", "case"), read_cases("look_ups"))
def test_the_look_up_asks_and_concludes_what_it_must(name, case):
    request, _ = freeze(name, find_case(name, case["request"]))
    settings = build_settings(name, case["settings"])
    head = TARGETS[name].http
    page = head.look_up.ask(request, 1_772_355_605_000, settings)
    for given in case["pages"]:
        assert page.method == "GET"
        assert page.body == b""
        assert page.url == fill(given["url"], request)
        assert "authorization" not in dict(page.headers)
        finding = read_finding(head, build_response(given, request), page, request, settings, now=NOW)
        page = getattr(finding, "request", None)
    assert type(finding).__name__ == case["finding"]
    value = next((getattr(finding, part) for part in ("reference", "code") if hasattr(finding, part)), "")
    assert value == case["value"]


@pytest.mark.parametrize("name", WITH_LOOK_UP)
def test_every_conclusion_of_a_look_up_has_a_fixture(name):
    findings = {case.values[1]["finding"] for case in read_cases("look_ups") if case.values[0] == name}
    assert {"Found", "Absent", "Unclear"} <= findings


@pytest.mark.parametrize("name", WITH_LOOK_UP)
@pytest.mark.parametrize("status", [200, 302, 400, 404, 408, 500, 502])
@pytest.mark.parametrize("answer", [b"", b"\x00\xff\xfe", b"{}", b"[]", b"null", b"<html>"])
def test_garbage_never_tells_that_a_posting_is_absent(name, status, answer):
    for case in (case.values[1] for case in read_cases("requests") if case.values[0] == name):
        request, settings = freeze(name, case)
        head = TARGETS[name].http
        page = head.look_up.ask(request, 1_772_355_605_000, settings)
        finding = read_finding(head, HttpResponse(status, {}, answer), page, request, settings, now=NOW)
        # An Answer is about the target as a whole: it is asked again.
        assert isinstance(finding, Unclear | Answer)


@pytest.mark.parametrize("name", TARGETS)
def test_class_c_comes_with_a_look_up(name):
    for case in (case.values[1] for case in read_cases("requests") if case.values[0] == name):
        if TARGETS[name].classify(build_settings(name, case["settings"])) is TargetClass.C:
            assert name in WITH_LOOK_UP


@pytest.mark.parametrize(("name", "case"), read_cases("completions"))
def test_a_request_is_completed_or_not_written(name, case):
    request, settings = freeze(name, find_case(name, case["request"]))
    head = TARGETS[name].http
    page = head.completion.ask(request, settings)
    if page is None:
        assert case["pages"] == []
        assert request.url == fill(case["url"], request)
        return
    read = None
    for given in case["pages"]:
        assert page.method == "GET"
        assert page.url == fill(given["url"], request)
        read = read_completion(head, build_response(given, request), page, request, settings, now=NOW)
        page = getattr(read, "request", None)
    if "url" in case:
        assert read == fill(case["url"], request)
    else:
        assert (read.kind, read.code) == (case["kind"], case["code"])


@pytest.mark.parametrize("name", TARGETS)
def test_every_way_an_answer_can_fall_out_has_a_fixture(name):
    kinds = {case.values[1]["kind"] for case in read_cases("answers") if case.values[0] == name}
    assert {None, "REJECTED", "UNAVAILABLE", "AMBIGUOUS"} <= kinds
    if name in OVER_HTTP:
        assert {"AUTH", "RATE_LIMITED"} <= kinds


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("answer", [b"", b"\x00\xff\xfe", b"{}", b"MSH|^~\\&", b"<html>", b"MSA|AA|x\r"])
def test_garbage_is_never_success_and_never_a_refusal(name, answer):
    request, settings = freeze(name, first_case(name))
    assert judge(name, answer, request, settings).kind is FailureKind.AMBIGUOUS


@pytest.mark.parametrize("name", OVER_HTTP)
@pytest.mark.parametrize(
    ("status", "kind"),
    [(302, "AMBIGUOUS"), (307, "UNAVAILABLE"), (400, "REJECTED"), (401, "AUTH"), (403, "AUTH"), (408, "AMBIGUOUS"),
     (409, "REJECTED"), (429, "RATE_LIMITED"), (500, "AMBIGUOUS"), (502, "AMBIGUOUS"), (503, "UNAVAILABLE"),
     (504, "AMBIGUOUS"), (599, "AMBIGUOUS")],
)  # fmt: skip
@pytest.mark.parametrize("body", [b"", b"<html>", b"[]"])
def test_a_status_without_a_readable_body_means_what_the_table_says(name, status, kind, body):
    request, settings = freeze(name, first_case(name))
    answer = judge(name, body, request, settings, status=status)
    assert answer.kind == kind
    assert answer.is_outage == (kind == "UNAVAILABLE")


@pytest.mark.parametrize("name", OVER_HTTP)
@pytest.mark.parametrize(
    ("status", "kind"),
    [(301, "AMBIGUOUS"), (303, "AMBIGUOUS"), (307, "UNAVAILABLE"), (407, "AUTH"), (408, "AMBIGUOUS"),
     (421, "UNAVAILABLE"), (425, "UNAVAILABLE"), (500, "AMBIGUOUS"), (503, "UNAVAILABLE")],
)  # fmt: skip
@pytest.mark.parametrize(
    "body",
    [b'{"Fault":{"Error":[{"code":"2020"}]}}', b'{"code":1002,"message":"x"}', b'{"code":21211,"status":400}',
     b'{"Summary":{"Succeeded":0,"Failed":1,"Other":0},"Messages":["x"]}', b'{"success":false}'],
)  # fmt: skip
def test_a_vendors_error_is_no_refusal_where_the_status_says_otherwise(name, status, kind, body):
    for case in (case.values[1] for case in read_cases("requests") if case.values[0] == name):
        request, settings = freeze(name, case)
        assert judge(name, body, request, settings, status=status).kind == kind


@pytest.mark.parametrize("name", OVER_HTTP)
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "Sun, 01 Mar 2026 09:00:36 GMT"}, 30),
        ({"retry-after": "Sun, 01 Mar 2026 10:00:36 GMT", "date": "Sun, 01 Mar 2026 09:59:36 GMT"}, 60),
        ({"retry-after": "Sun, 01 Mar 2026 08:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "86400"}, 3600),
    ],
)
def test_retry_after_is_taken_in_both_forms_and_bounded(name, status, headers, seconds):
    request, settings = freeze(name, first_case(name))
    assert judge(name, b"", request, settings, status=status, headers=headers).retry_after == seconds


@pytest.mark.parametrize("name", OVER_HTTP)
def test_no_secret_is_in_what_is_frozen_or_shown(name):
    request, settings = freeze(name, first_case(name))
    given = json.loads((find_fixtures(name) / "settings.json").read_text("utf-8"))
    secrets = [value for value in given.values() if isinstance(value, str) and value.startswith("planted-")]
    assert secrets
    frozen = f"{request.body!r} {request.method} {request.url} {request.headers}"
    for secret in secrets:
        assert secret not in frozen
        assert secret not in repr(settings)
        assert secret not in repr(request)
    assert "authorization" not in {header.lower() for header, _ in request.headers}


@pytest.mark.parametrize(("name", "case"), read_cases("requests"))
def test_the_ledger_gives_back_the_same_request(name, case):
    request, _ = freeze(name, case)
    entry = Entry("IN_FLIGHT", "payments", 1, "e", body=request.body, control_id=request.control_id,
                  reference=request.reference, method=request.method, url=request.url,
                  request_headers=list(request.headers))  # fmt: skip
    ledger = Ledger("payments", Policy(target_class=TargetClass.A, call_deadline=1, session_timeout=1))
    ledger.restore("x", decode_entry(encode_entry(entry)))
    assert ledger.queues.attempts["x"].request == request


@pytest.mark.parametrize("name", TARGETS)
def test_settings_refuse_unknown_keys_and_lacking_ones(name):
    with pytest.raises(ValidationError, match="no_such_key"):
        build_settings(name, {"no_such_key": 1})
    with pytest.raises(ValidationError):
        TARGETS[name].settings.model_validate({"name": "x", "connector": name})


@pytest.mark.parametrize("name", TARGETS)
def test_a_class_that_resends_knows_its_window(name):
    settings = build_settings(name)
    if TARGETS[name].classify(settings) is TargetClass.A:
        assert TARGETS[name].window(settings) > 0


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_is_routed_or_not_and_a_strange_facility_never(name, kind):
    event = msgspec.convert(first_case(name)["event"] | {"kind": kind.value}, MoneyEvent)
    settings = build_settings(name)
    assert isinstance(TARGETS[name].routes(event, settings), bool)
    event.facility = "elsewhere"
    assert not TARGETS[name].routes(event, settings)


@pytest.mark.parametrize("name", TARGETS)
def test_neither_repr_nor_log_nor_failure_shows_a_patient(name, caplog):
    caplog.set_level(logging.DEBUG)
    case = first_case(name)
    event = {**case["event"], "object_id": "Zebra-Planted-Text-" * 10, "visit": {
        "authority": "NORTH", "id_type": "VN", "value": "PLANTEDVISIT"}}  # fmt: skip
    path = find_fixtures(name) / "planted.json"
    given = json.loads(path.read_text("utf-8")) if path.exists() else {"mrn": "PLANTEDMRN"}
    planted = {**case, "event": event, "context": {**case["context"], "mrn": {
        "authority": "NORTH", "id_type": "MR", "value": given["mrn"]}}}  # fmt: skip
    seen = repr(build_context(planted))
    try:
        request, settings = freeze(name, planted)
    except Failure as failure:
        seen += repr(failure) + str(failure)
        request, settings = freeze(name, {**planted, "event": {**event, "object_id": "x"}})
    answer = f"{given['mrn']}|PLANTEDVISIT".encode()
    seen += repr(request) + repr(judge(name, answer, request, settings)) + caplog.text
    patient = re.compile(f"{given['mrn']}|PLANTED")
    assert bool(patient.search(request.body.decode() + request.url)) == TARGETS[name].accepts_phi
    assert bool(patient.search(request.url)) == bool(given.get("in_url"))
    assert not patient.search(seen)
    assert "Planted" not in seen


@pytest.mark.parametrize("name", TARGETS)
def test_the_file_is_pure_and_documented(name):
    path = find_parts(name)[0]
    tree = ast.parse(path.read_text("utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not imported & {"time", "random", "logging", "socket", "asyncio", "secrets", "uuid", "telemetry", "clients"}
    assert "now(" not in path.read_text("utf-8")
    assert ast.get_docstring(tree)
    assert TARGETS[name].documentation.startswith("https://")


@pytest.mark.parametrize("name", TARGETS)
def test_its_mapping_passes_its_own_check(name):
    path = find_parts(name)[1]
    assert check_files([path]) == []


def test_money_of_the_fixtures_is_written_by_hand():
    """The fixtures' amounts agree with ISO 4217, read here from their own text."""
    for case in read_cases("requests"):
        money = Money(**case.values[1]["event"]["money"])
        text = "\n".join(case.values[1]["request"])
        if case.values[0] in OVER_HTTP:
            place = case.values[1].get("amount_at", r'"(?:TotalAmt|[Aa]mount)":([0-9.]+)[,}]')
            digits = re.search(place, text)[1]
        else:
            digits = text.split(f"&{money.currency}", 1)[0].rsplit("|", 1)[1].lstrip("-")
        assert int(digits.replace(".", "")) == money.minor
        assert len(digits.partition(".")[2]) == money.exponent
