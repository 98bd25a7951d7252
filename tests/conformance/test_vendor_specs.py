"""Requests and questions of targets against the vendors' own OpenAPI documents, checked in this process.

The documents are not part of the tree: they are read from ``REMITSTREAM_SHARED`` and the tests are skipped without it.
"""

import json
import os
import re
from functools import cache
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import jsonschema
import pytest
import yaml

from tests.conformance.test_targets import fill, find_fixtures, freeze, read_cases

SPECS = Path(os.environ.get("REMITSTREAM_SHARED", Path(__file__).parents[3] / "shared")) / "specs"

VENDORS = {
    "zoho_books": (SPECS / "zoho-books" / "customer-payments.yml", {"invoice_id", "amount_applied"}),
    "twilio_sms": (SPECS / "twilio" / "twilio_api_v2010.messages.json", set()),
}
"""The document, and members that it calls required although they belong to a member of another: its own mistake."""


@cache
def load_document(path):
    if not path.exists():
        pytest.skip("the vendor's document is not here")
    text = path.read_text("utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


def resolve(document, node):
    """The node with every reference replaced, and objects closed against members that the vendor does not name."""
    if isinstance(node, list):
        return [resolve(document, part) for part in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = document
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part.replace("~1", "/")]
        return resolve(document, target)
    found = {name: resolve(document, part) for name, part in node.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found["additionalProperties"] = False
    return found


def find_operation(document, method, url):
    """The operation of a request, and its parameters by place and name."""
    address = urlsplit(url)
    base = urlsplit(document["servers"][0]["url"]).path
    for template, item in document["paths"].items():
        own = base + template
        pattern = re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(own))
        if re.fullmatch(pattern, address.path) and method.lower() in item:
            operation = resolve(document, item[method.lower()])
            given = [*resolve(document, item.get("parameters", [])), *operation.get("parameters", [])]
            return operation, {(part["in"], part["name"].lower()): part for part in given}
    raise AssertionError(f"the vendor has no {method} {address.path}")


def check_call(document, method, url, headers, body, spurious):
    operation, parameters = find_operation(document, method, url)
    given = {("query", name.lower()): value for name, value in parse_qsl(urlsplit(url).query)}
    usual = {"accept", "content-type", "authorization"}
    given |= {("header", name.lower()): value for name, value in headers if name.lower() not in usual}
    for place in given:
        # Zoho writes the forms of a search parameter into its description: NAME_startswith.
        name = place[1].removesuffix("_startswith")
        assert (place[0], name) in parameters
        if name != place[1]:
            assert place[1] in parameters[place[0], name]["description"]
    required = {place for place, part in parameters.items() if part.get("required") and place[0] != "path"}
    assert required <= set(given)
    content = operation.get("requestBody", {}).get("content", {})
    if not content:
        assert body == b""
        return
    kind = dict(headers)["content-type"].partition(";")[0]
    schema = content[kind]["schema"]
    schema["required"] = [name for name in schema.get("required", []) if name not in spurious]
    form = kind == "application/x-www-form-urlencoded"
    jsonschema.validate(read_form(body, schema) if form else json.loads(body), schema)


def read_form(body, schema):
    """A form's members, numbers where the vendor wants a number."""
    given = dict(parse_qsl(body.decode(), strict_parsing=True))
    types = {name: schema["properties"].get(name, {}).get("type") for name in given}
    return {name: int(text) if types[name] == "integer" else text for name, text in given.items()}


def list_cases(kind):
    return [case for case in read_cases(kind) if case.values[0] in VENDORS]


@pytest.mark.parametrize(("name", "case"), list_cases("requests"))
def test_a_request_is_one_the_vendor_describes(name, case):
    path, spurious = VENDORS[name]
    request, _ = freeze(name, case)
    check_call(load_document(path), request.method, request.url, request.headers, request.body, spurious)


@pytest.mark.parametrize(("name", "case"), list_cases("look_ups"))
def test_a_question_is_one_the_vendor_describes(name, case):
    path, spurious = VENDORS[name]
    wanted = json.loads((find_fixtures(name) / "requests" / f"{case['request']}.json").read_text("utf-8"))
    request, _ = freeze(name, wanted)
    for page in case["pages"]:
        check_call(load_document(path), "GET", fill(page["url"], request), (), b"", spurious)


def test_the_check_itself_refuses_what_the_vendor_does_not_know():
    path, spurious = VENDORS["zoho_books"]
    document = load_document(path)
    request, _ = freeze("zoho_books", next(c.values[1] for c in read_cases("requests") if c.values[0] == "zoho_books"))
    good = json.loads(request.body)
    wrong = (good | {"amuont": 1}, good | {"amount": "12.50"}, {k: v for k, v in good.items() if k != "customer_id"})
    for body in wrong:
        with pytest.raises(jsonschema.ValidationError):
            check_call(document, request.method, request.url, request.headers, json.dumps(body).encode(), spurious)
    for method, url, headers in (
        ("PATCH", request.url, request.headers),
        ("PUT", request.url.replace("organization_id", "organisation"), request.headers),
        ("PUT", request.url + "&colour=red", request.headers),
        ("PUT", request.url, (("content-type", "application/json"),)),
    ):
        with pytest.raises(AssertionError):
            check_call(document, method, url, headers, request.body, spurious)
