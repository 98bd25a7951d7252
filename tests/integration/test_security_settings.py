"""Settings that protect: certificates, log-ins, secrets, safe topics. Right ones are in use, wrong ones refused.

Certificates are made by the openssl program when the tests run.
"""

import base64
import contextlib
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
import uuid

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from pydantic import ValidationError

from identity.projection import Identities, RedisDown, RedisFilesUnusable, RedisSettings
from schemas.keys import HmacKey
from topics.cluster import KafkaFilesUnusable, KafkaSettings
from topics.registry import Registry, RegistryFilesUnusable, RegistrySettings, RegistryUnreachable

pytestmark = pytest.mark.integration

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl program is not installed")


class Certificates:
    """An authority with a server and a client certificate, and another authority that nobody trusts."""

    def __init__(self, folder):
        self.folder = folder
        for authority in ("ca", "stranger"):
            self._run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={authority}",
                      "-keyout", f"{authority}.key", "-out", f"{authority}.pem")  # fmt: skip
        self._sign("server", "ca", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        self._sign("client", "ca", "extendedKeyUsage=clientAuth")
        self._sign("burglar", "stranger", "extendedKeyUsage=clientAuth")

    def path(self, name):
        return str(self.folder / name)

    def build_client(self, own=None):
        """A client's context that trusts the authority; ``own`` names the certificate that it shows."""
        context = ssl.create_default_context(cafile=self.path("ca.pem"))
        if own:
            context.load_cert_chain(self.path(f"{own}.pem"), self.path(f"{own}.key"))
        return context

    def build_server(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path("server.pem"), self.path("server.key"))
        return context

    def _sign(self, name, authority, extension):
        (self.folder / f"{name}.ext").write_text(extension)
        self._run("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{name}.key",
                  "-out", f"{name}.csr")  # fmt: skip
        self._run("x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey",
                  f"{authority}.key", "-CAcreateserial", "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip

    def _run(self, *arguments):
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@contextlib.contextmanager
def terminate_tls(context, host, port):
    """A TLS server on a port of its own that passes everything on to a plain one. Yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source, sink):
        with contextlib.suppress(OSError), source, sink:
            while data := source.recv(65536):
                sink.sendall(data)

    def serve():
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                line = context.wrap_socket(plain, server_side=True)
                backend = socket.create_connection((host, port))
            except OSError:
                plain.close()
                continue
            for pair in ((line, backend), (backend, line)):
                threading.Thread(target=copy, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def split_address(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


# ---------------------------------------------------------------- our own servers


@needs_openssl
def test_receiver_and_listener_over_tls(deploy, outside, certificates):
    """Webhooks over HTTPS; HL7 over TLS from senders whose certificate our authority signed, and from no others."""
    files = {"certificate": certificates.path("server.pem"), "key": certificates.path("server.key")}
    deployment = deploy(
        **{f"receiver__tls__{name}": path for name, path in files.items()},
        **{f"listener__tls__{name}": path for name, path in files.items()},
        listener__tls__client_ca=certificates.path("ca.pem"),
    )
    for command in ("receive", "listen"):
        deployment.start(command)
    for role in ("receiver", "listener"):
        deployment.await_ready(role)
    world = outside(deployment)
    body = json.dumps({"id": "evt_1", "type": "x", "data": {"object": {"id": "pi_1"}}}).encode()
    assert world.post(body, signature=world.sign(body), tls=certificates.build_client())[0] == 200
    with pytest.raises(OSError):
        world.post(body, signature=world.sign(body))
    with pytest.raises(ssl.SSLCertVerificationError):
        world.post(body, signature=world.sign(body), tls=ssl.create_default_context())

    message = b"MSH|^~\\&|EPICADT|LSNORTH|R|L|20260301120000||ADT^A04|C1|P|2.5.1\rPID|1||N1^^^NORTH^MR\r"
    assert b"MSA|AA|C1" in world.send_hl7(message, tls=certificates.build_client("client"))
    for tls in (None, certificates.build_client(), certificates.build_client("burglar")):
        try:
            assert world.send_hl7(message, tls=tls) == b""
        except OSError:
            continue  # TLS 1.3 tells a client only when it reads
    assert sum(world.read_ends("raw.stripe").values()) == 1
    (record,) = world.read_topic("raw.hl7")
    assert dict(record.headers())["verdict"].startswith(b"mllps;")


@pytest.mark.parametrize(
    ("command", "section", "code"), [("receive", "receiver", "RS162"), ("listen", "listener", "RS151")]
)
def test_a_certificate_that_is_none_is_refused_at_the_start(deploy, tmp_path, command, section, code):
    (tmp_path / "broken.pem").write_text("no certificate")
    broken = str(tmp_path / "broken.pem")
    deployment = deploy(**{f"{section}__tls__certificate": broken, f"{section}__tls__key": broken})
    process = deployment.start(command)
    assert process.wait(60) == 78
    log = (deployment.folder / f"{command}.log").read_text("utf-8")
    assert f'"code":"{code}"' in log
    assert "no certificate" not in log


# ---------------------------------------------------------------- registry


@contextlib.contextmanager
def serve_registry(url, context, user, password):
    """An HTTPS registry with a log-in before the real one. Yields its address."""
    wanted = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    base = url.rsplit("/apis/", 1)[0]

    class Relay(http.server.BaseHTTPRequestHandler):
        def relay(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
            if self.headers.get("Authorization") != wanted:
                status, answer = 401, b"{}"
            else:
                request = urllib.request.Request(base + self.path, body, method=self.command)  # noqa: S310
                request.add_header("Content-Type", self.headers.get("Content-Type", ""))
                try:
                    with urllib.request.urlopen(request) as found:  # noqa: S310
                        status, answer = found.status, found.read()
                except urllib.error.HTTPError as error:
                    status, answer = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = relay  # noqa: N815 - the names that the server looks for

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Relay)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}/apis/ccompat/v7"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@needs_openssl
def test_registry_over_tls_with_a_log_in(stack, certificates):
    subject, schema = f"tls-{uuid.uuid4().hex}", '{"type":"record","name":"A","fields":[]}'
    with serve_registry(stack.registry_url, certificates.build_server(), "remitstream", "right") as url:
        login = {"url": url, "username": "remitstream", "password": "right"}
        registry = Registry(RegistrySettings(**login, ca_location=certificates.path("ca.pem")))
        schema_id = registry.register(subject, schema)
        assert registry.find_id(subject, schema) == schema_id
        with pytest.raises(RegistryUnreachable):
            Registry(RegistrySettings(**login)).ping()  # not signed by an authority that everybody trusts
        with pytest.raises(RegistryUnreachable):
            Registry(RegistrySettings(**login, ca_location=certificates.path("stranger.pem"))).ping()
        wrong = login | {"password": "wrong"}
        with pytest.raises(Exception, match="refuses our credentials") as refused:
            Registry(RegistrySettings(**wrong, ca_location=certificates.path("ca.pem"))).ping()
        assert refused.value.exit_code == 78
        assert "wrong" not in str(refused.value)


# ---------------------------------------------------------------- Redis


@needs_openssl
async def test_redis_over_tls(stack, certificates):
    address = split_address(stack.redis_url.removeprefix("redis://").removesuffix("/0"))
    key = HmacKey(b"k" * 32)

    async def ask(ca):
        settings = RedisSettings(url=f"rediss://127.0.0.1:{port}/0", ca_location=ca and certificates.path(ca))
        async with Identities(settings, key) as identities:
            return await identities._connection.call(identities._connection.client.ping)

    with terminate_tls(certificates.build_server(), *address) as port:
        assert await ask("ca.pem")
        for ca in (None, "stranger.pem"):
            with pytest.raises(RedisDown):
                await ask(ca)


# ---------------------------------------------------------------- Kafka


def ask_until_answered(settings):
    """Metadata over the first connection. The client may try the address that the broker tells, which has no TLS, and
    not come back to the first one: then a new client asks again."""
    for _ in range(9):
        with contextlib.suppress(KafkaException):
            return AdminClient(settings.build_client("tls")).list_topics(timeout=4)
    return AdminClient(settings.build_client("tls")).list_topics(timeout=4)


@needs_openssl
def test_kafka_over_tls_reaches_the_broker_only_under_our_authority(stack, certificates):
    """The first connection. Further ones go where the broker says, which the embedded one has no TLS address for."""
    with terminate_tls(certificates.build_server(), *split_address(stack.kafka_bootstrap)) as port:
        settings = {"bootstrap": f"127.0.0.1:{port}", "security_protocol": "SSL"}
        trusted = KafkaSettings(**settings, ssl_ca_location=certificates.path("ca.pem"))
        found = ask_until_answered(trusted)
        assert [f"{broker.host}:{broker.port}" for broker in found.brokers.values()] == [stack.kafka_bootstrap]
        stranger = KafkaSettings(**settings, ssl_ca_location=certificates.path("stranger.pem"))
        with pytest.raises(KafkaException):
            AdminClient(stranger.build_client("tls")).list_topics(timeout=2)


def test_every_setting_reaches_the_client_under_its_name(tmp_path):
    """Names of librdkafka's CONFIGURATION.md."""
    plain = KafkaSettings(bootstrap="a:1,b:2").build_client("me")
    assert {
        "bootstrap.servers": "a:1,b:2",
        "client.id": "me",
        "security.protocol": "PLAINTEXT",
    }.items() <= plain.items()
    assert not [name for name in plain if name.startswith(("sasl", "ssl"))]
    protected = KafkaSettings(
        bootstrap="a:1",
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="us",
        sasl_password="secret word",
    )
    assert {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "us",
        "sasl.password": "secret word",
    }.items() <= protected.build_client("me").items()
    assert "secret word" not in repr(protected)
    AdminClient(protected.build_client("me"))  # the library knows every name and value


@needs_openssl
def test_mutual_tls_reaches_the_client(certificates):
    settings = KafkaSettings(
        security_protocol="SSL",
        ssl_ca_location=certificates.path("ca.pem"),
        ssl_certificate_location=certificates.path("client.pem"),
        ssl_key_location=certificates.path("client.key"),
    )
    client = settings.build_client("me")
    assert client["ssl.ca.location"] == certificates.path("ca.pem")
    assert client["ssl.certificate.location"] == certificates.path("client.pem")
    assert client["ssl.key.location"] == certificates.path("client.key")
    AdminClient(client)
    mixed = settings.model_copy(update={"ssl_key_location": certificates.path("burglar.key")})
    with pytest.raises(KafkaFilesUnusable):
        mixed.build_client("me")


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (KafkaSettings, {"security_protocol": "SASL_SSL"}),
        (KafkaSettings, {"security_protocol": "SASL_SSL", "sasl_mechanism": "PLAIN", "sasl_username": "us"}),
        (KafkaSettings, {"sasl_mechanism": "PLAIN", "sasl_username": "us", "sasl_password": "word"}),
        (KafkaSettings, {"security_protocol": "SSL", "sasl_password": "word"}),
        (KafkaSettings, {"ssl_ca_location": "/ca.pem"}),
        (KafkaSettings, {"security_protocol": "SSL", "ssl_certificate_location": "/own.pem"}),
        (KafkaSettings, {"security_protocol": "TLS"}),
        (RegistrySettings, {"url": "http://registry:1", "ca_location": "/ca.pem"}),
        (RegistrySettings, {"url": "https://registry:1", "username": "us"}),
        (RegistrySettings, {"url": "registry:1"}),
        (RedisSettings, {"url": "redis://redis:1", "ca_location": "/ca.pem"}),
        (RedisSettings, {"url": "rediss://us:word@redis:1"}),
    ],
)
def test_protection_that_would_not_work_is_refused(model, given):
    with pytest.raises(ValidationError):
        model(**given)


@pytest.mark.parametrize(
    ("error", "use"),
    [
        (KafkaFilesUnusable, lambda f: KafkaSettings(security_protocol="SSL", ssl_ca_location=f).build_client("me")),
        (RegistryFilesUnusable, lambda f: Registry(RegistrySettings(url="https://registry:1", ca_location=f))),
        (
            RedisFilesUnusable,
            lambda f: Identities(RedisSettings(url="rediss://redis:1", ca_location=f), HmacKey(b"k" * 32)),
        ),
    ],
)
def test_an_authority_file_that_is_none_is_named(tmp_path, error, use):
    (tmp_path / "broken.pem").write_text("not PEM")
    with pytest.raises(error) as told:
        use(str(tmp_path / "broken.pem"))
    assert told.value.exit_code == 78
    assert told.value.remedy


# ---------------------------------------------------------------- the command line


def run(deployment, *arguments, **overrides):
    """Exit code, standard output and error of a command of ours on a deployment."""
    settings = deployment.settings.list_arguments()
    for key, value in overrides.items():
        settings += ["--set", f"{key.replace('__', '.')}={value}"]
    done = subprocess.run(
        [sys.executable, "-m", "runtime.cli", *arguments, *settings],
        cwd=deployment.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": "200"},
    )
    return done.returncode, done.stdout, done.stderr


def test_a_literal_secret_is_refused_by_every_process_and_never_repeated(deploy):
    deployment = deploy()
    literal = "whsec_literalsecretvalue0123456789"
    text = deployment.path.read_text("utf-8")
    reference = "file:../.remitstream/secrets/stripe-north.key"
    assert reference in text
    deployment.path.write_text(text.replace(reference, literal), "utf-8")
    for command in ("receive", "worker", "config check", "config show"):
        code, out, err = run(deployment, *command.split())
        assert code == 78, command
        assert "accounts" in err, command
        assert "env:NAME" in err, command
        assert literal not in out + err, command


def test_topics_outside_the_embedded_mode(deploy, outside):
    """On one broker: nothing is created or weakened, the check names every difference, and each error its remedy."""
    deployment = deploy()
    world = outside(deployment)
    before = world.list_configurations()

    code, out, _ = run(deployment, "topics", "check", "--json", stack__embedded="false")
    problems = json.loads(out)["problems"]
    assert code == 1
    for name in world.list_topics():
        assert f"{name}: replication 1, wanted 3" in problems
        assert f"{name}: min.insync.replicas is not 2" in problems
    assert run(deployment, "topics", "check")[0] == 0

    code, out, _ = run(deployment, "topics", "apply", "--json", stack__embedded="false")
    told = json.loads(out)["error"]
    assert (code, told["code"]) == (1, "RS312")
    assert "3 replicas" in told["remedy"]
    assert world.list_configurations() == before

    code, out, _ = run(deployment, "topics", "apply", "--json", worker__partitions="7")
    told = json.loads(out)["error"]
    assert (code, told["code"]) == (1, "RS310")
    assert told["place"] in world.list_topics()
    assert world.list_configurations() == before

    deployment.delete_topics()
    code, out, _ = run(deployment, "topics", "apply", "--json", stack__embedded="false")
    told = json.loads(out)["error"]
    assert (code, told["code"]) == (1, "RS313")
    assert "at least 3 brokers" in told["remedy"]
    assert "INVALID_REPLICATION_FACTOR" in told["detail"]
    assert not set(world.list_topics()) & set(world.list_configurations())
    assert run(deployment, "topics", "apply")[0] == 0
    assert world.list_configurations() == before
