"""What a start waits for and says so, and what it refuses, with code, place and remedy, before anything is read."""

import contextlib
import json
import socket
import time
import urllib.error
import urllib.request
import uuid

import pytest

from topics.registry import Registry, register_schemas

pytestmark = pytest.mark.integration

PAYMENTS = "payments-value"


@pytest.fixture(scope="module")
def deployment(deploy_for_module):
    """Settings and topics only; the tests start what they need."""
    return deploy_for_module()


@pytest.fixture(autouse=True)
def _clean(deployment, embedded_stack):
    """Nothing of ours runs between two tests, everything of the stack does."""
    embedded_stack.up()
    yield
    deployment.close()
    embedded_stack.up()
    for log in deployment.folder.glob("*.log"):
        log.unlink()


def read_refusal(deployment, command, code):
    """What a process says that must not start; it ends with this exit code."""
    process = deployment.start(command)
    assert process.wait(60) == code, deployment.read_logs()
    log = (deployment.folder / f"{command}.log").read_text("utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    (told,) = [line for line in lines if line["event"] == "stopped_by_error"]
    assert told["remedy"]
    return told


def call_registry(deployment, method, path, body=None):
    """Status and answer of the registry, asked without our client."""
    request = urllib.request.Request(  # noqa: S310
        deployment.settings.registry.url + path,
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/vnd.schemaregistry.v1+json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, None


# ---------------------------------------------------------------- waited for


def await_reason(deployment, role, code):
    deployment.wait_until(
        lambda: any(code in reason for reason in deployment.read_reasons(role).values()), f"{role} does not say {code}"
    )


def test_registry_and_redis_away_at_the_start(deployment, embedded_stack, outside):
    embedded_stack.stop("registry")
    embedded_stack.stop("redis")
    for command in ("receive", "project", "worker", "deliver"):
        deployment.start(command)
    deployment.await_ready("receiver")  # needs neither
    for role, code in (("projector", "RS240"), ("worker", "RS212"), ("deliverer", "RS212")):
        await_reason(deployment, role, code)
    world = outside(deployment)
    number = uuid.uuid4().hex
    intent = {"id": f"pi_{number}", "amount_received": 100, "currency": "usd", "status": "succeeded"}
    event = {"id": f"evt_{number}", "created": int(time.time()), "type": "payment_intent.succeeded"}
    body = json.dumps(event | {"data": {"object": intent | {"metadata": {"mrn": "N1"}}}}).encode()
    assert world.deliver(body) == 200
    embedded_stack.start("registry")
    await_reason(deployment, "worker", "RS240")
    assert {process.poll() for process in deployment.processes.values()} == {None}
    embedded_stack.start("redis")
    for role in ("projector", "worker", "deliverer"):
        deployment.await_ready(role)
    account = deployment.await_account(lambda found: not found.pending)
    assert account.raw.parts["waiting"] == account.raw.total == 1  # its patient is not known
    assert account.balanced


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("command", "role", "code"),
    [
        ("receive", None, "RS260"),
        ("listen", None, "RS230"),
        ("receive", "receiver", "RS250"),
        ("listen", "listener", "RS250"),
        ("project", "projector", "RS250"),
        ("worker", "worker", "RS250"),
        ("deliver", "deliverer", "RS250"),
    ],
)
def test_a_port_that_is_taken_is_named(deployment, command, role, code):
    own = deployment.receiver_port if command == "receive" else deployment.listener_port
    port = own if role is None else deployment.ports[role]
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        told = read_refusal(deployment, command, 75)
    assert told["code"] == code
    assert str(port) in told["place"]


def test_a_sandbox_port_that_is_taken_is_named(deployment):
    port = deployment.settings.targets[0].port
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        told = read_refusal(deployment, "sandbox", 75)
    assert told["code"] == "RS270"
    assert str(port) in told["detail"]


def test_a_state_folder_that_cannot_be_written_is_named(deployment):
    """A file stands where the folder should be; permissions would not stop the superuser."""
    state = deployment.settings.worker.state
    with contextlib.ExitStack() as stack:
        if state.exists():
            aside = state.with_name("aside")
            state.rename(aside)
            stack.callback(aside.rename, state)
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text("a file")
        stack.callback(state.unlink)
        told = read_refusal(deployment, "worker", 1)
    assert told["code"] == "RS320"
    assert str(state) in told["place"]
    assert "worker.state" in told["remedy"]
    assert deployment.account().balanced


@pytest.fixture
def subject(deployment):
    """The subject of payments, put right again at the end."""
    yield PAYMENTS
    call_registry(deployment, "DELETE", f"/subjects/{PAYMENTS}")
    register_schemas(Registry(deployment.settings.registry), deployment.settings.topics)


def test_a_schema_that_is_not_registered_is_refused(deployment, subject):
    assert call_registry(deployment, "DELETE", f"/subjects/{subject}")[0] == 200
    told = read_refusal(deployment, "worker", 78)
    assert (told["code"], told["place"]) == ("RS110", subject)
    assert "schemas register" in told["remedy"]


def test_a_schema_that_breaks_the_registered_one_is_refused(deployment, subject):
    """Somebody registered another history: what this version writes could not be read by it."""
    assert call_registry(deployment, "DELETE", f"/subjects/{subject}")[0] == 200
    other = {
        "type": "record",
        "name": "MoneyEvent",
        "namespace": "remitstream",
        "fields": [{"name": "only_here", "type": "long"}],
    }
    call_registry(deployment, "PUT", f"/config/{subject}", {"compatibility": "FULL_TRANSITIVE"})
    assert call_registry(deployment, "POST", f"/subjects/{subject}/versions", {"schema": json.dumps(other)})[0] == 200
    told = read_refusal(deployment, "worker", 1)
    assert (told["code"], told["place"]) == ("RS311", subject)
    versions = call_registry(deployment, "GET", f"/subjects/{subject}/versions")[1]
    assert len(versions) == 1  # nothing was changed
