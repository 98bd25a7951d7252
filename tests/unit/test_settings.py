import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from pydantic import Field, SecretStr

from runtime import connectors
from runtime.configuration import MissingFileError, SettingsError
from runtime.layers import Rank
from runtime.settings import ensure_secrets, read_settings
from sinks.contract import TargetSettings

KEY = "k" * 32
FILE = """\
tenant = "lakeshore"

[[facilities]]
id = "north"
time_zone = "America/Chicago"
default_authority = "NORTH"
authorities = [{ name = "NORTH", aliases = ["2.16.1"] }]

[[facilities]]
id = "harbor"
time_zone = "America/New_York"
default_authority = "HARBOR"
authorities = [
  { name = "HARBOR", aliases = ["2.16.2"] },
]

[[accounts]]
name = "north-card"
source = "till"
facility = "north"
secrets = ["env:T_NORTH", "file:secrets/next.key"]

[[feeds]]
name = "north-adt"
facility = "north"
sending_application = "ADT"
sending_facility = "N"

[[targets]]
name = "epic-north"
connector = "wire"
facilities = ["north"]
port = 2600
password = "env:T_WIRE"

[secrets]
hmac_key = "env:T_HMAC"

[kafka]
bootstrap = "broker:9092"

[registry]
url = "http://registry"

[redis]
url = "redis://redis:6379/0"
"""


class WireSettings(TargetSettings):
    port: int = Field(ge=1, le=65535)
    password: SecretStr | None = None
    style: Literal["plain", "fancy"] = "plain"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own, known connectors, and none of the caller's variables."""
    for name in list(os.environ):
        if name.upper().startswith("REMITSTREAM_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(connectors.gateway_catalog, "discover", lambda _extra=None: {"till": None})
    monkeypatch.setattr(
        connectors.target_catalog, "discover", lambda _extra=None: {"wire": SimpleNamespace(settings=WireSettings)}
    )
    for name, value in {"T_NORTH": "north-secret-1", "T_WIRE": "wire-secret-2", "T_HMAC": KEY}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "next.key").write_text("next-secret-3\n")
    (tmp_path / "remitstream.toml").write_text(FILE)
    return tmp_path


def change(place, old, new):
    text = (place / "remitstream.toml").read_text()
    assert text.count(old) == 1, old
    (place / "remitstream.toml").write_text(text.replace(old, new))


def fail(*overrides):
    """The issues of a configuration that must be refused, by key."""
    with pytest.raises(SettingsError) as caught:
        read_settings(None, overrides)
    return {issue.key: issue for issue in caught.value.issues}


def find_line(text):
    return FILE.splitlines().index(text) + 1


def test_a_correct_file_is_read_whole():
    settings = read_settings()
    assert settings.tenant == "lakeshore"
    assert [facility.id for facility in settings.tenancy.facilities] == ["north", "harbor"]
    account = settings.tenancy.find_account("till", "north-card")
    assert [secret.get_secret_value() for secret in account.secrets] == ["north-secret-1", "next-secret-3"]
    assert isinstance(settings.targets[0], WireSettings)
    assert settings.targets[0].password.get_secret_value() == "wire-secret-2"
    assert settings.embedded is False
    assert settings.sources == ("till", "hl7")
    assert {"raw.till", "raw.hl7", "payments", "attempts.epic-north"} <= {topic.name for topic in settings.topics}


def test_no_secret_is_in_any_text_of_the_settings():
    settings = read_settings()
    shown = repr(settings) + str(settings) + settings.model_dump_json() + " ".join(settings.list_arguments())
    for secret in ("north-secret-1", "wire-secret-2", "next-secret-3", KEY):
        assert secret not in shown


def test_flag_before_variable_before_file_before_default(monkeypatch):
    default = read_settings()
    assert (default.worker.partitions, default.kafka.bootstrap) == (4, "broker:9092")
    monkeypatch.setenv("REMITSTREAM_KAFKA__BOOTSTRAP", "variable:1")
    monkeypatch.setenv("remitstream_worker__partitions", "6")
    from_environment = read_settings()
    assert (from_environment.worker.partitions, from_environment.kafka.bootstrap) == (6, "variable:1")
    assert from_environment.find_origin(("worker", "partitions")).rank is Rank.ENVIRONMENT
    flagged = read_settings(None, [("kafka.bootstrap", "flag:1")])
    assert (flagged.worker.partitions, flagged.kafka.bootstrap) == (6, "flag:1")
    assert flagged.find_origin(("kafka", "bootstrap")).place == "flag --set kafka.bootstrap"
    line = find_line('url = "http://registry"')
    assert flagged.find_origin(("registry", "url")).place == f"remitstream.toml:{line}"
    assert flagged.find_origin(("log", "level")) is None


def test_an_empty_variable_is_not_set(monkeypatch):
    monkeypatch.setenv("REMITSTREAM_KAFKA__BOOTSTRAP", "")
    assert read_settings().kafka.bootstrap == "broker:9092"


def test_list_elements_are_changed_by_name(monkeypatch):
    monkeypatch.setenv("REMITSTREAM_TARGETS__EPIC_NORTH__PORT", "2700")
    monkeypatch.setenv("REMITSTREAM_TARGETS__EPIC_NORTH__FACILITIES", '["harbor", "north"]')
    settings = read_settings(None, [("targets.epic-north.style", "fancy")])
    target = settings.targets[0]
    assert (target.port, target.facilities, target.style) == (2700, ("harbor", "north"), "fancy")


def test_a_list_element_that_is_not_there_is_named():
    issue = fail(("targets.epic-nort.port", "1"))["targets.epic-nort"]
    assert issue.accepted == "epic-north"
    assert issue.remedy == "Did you mean `epic-north`?"


def test_everything_may_come_from_variables(place, monkeypatch):
    (place / "remitstream.toml").unlink()
    monkeypatch.setenv("REMITSTREAM_TENANT", "elsewhere")
    monkeypatch.setenv(
        "REMITSTREAM_FACILITIES",
        '[{"id":"a","time_zone":"UTC","default_authority":"A","authorities":[{"name":"A"}]}]',
    )
    monkeypatch.setenv("REMITSTREAM_SECRETS__HMAC_KEY", "env:T_HMAC")
    monkeypatch.setenv("REMITSTREAM_STACK__EMBEDDED", "true")
    settings = read_settings()
    assert settings.file is None
    assert settings.facilities[0].id == "a"
    assert settings.worker.state == place / ".remitstream" / "state"


def test_no_file_and_no_variables_names_init(place):
    (place / "remitstream.toml").unlink()
    with pytest.raises(MissingFileError) as caught:
        read_settings()
    assert "remitstream init" in caught.value.remedy


def test_the_file_may_be_named_by_a_variable(place, monkeypatch):
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "r.toml").write_text(FILE.replace("lakeshore", "other").replace("file:", f"file:{place}/"))
    monkeypatch.setenv("REMITSTREAM_CONFIG", "elsewhere/r.toml")
    assert read_settings().tenant == "other"


def test_relative_paths_begin_in_the_folder_of_the_file(place, monkeypatch):
    change(place, "[secrets]\n", '[worker]\nstate = "data/state"\n[secrets]\n')
    (place / "other").mkdir()
    monkeypatch.chdir(place / "other")
    settings = read_settings(place / "remitstream.toml", [("stack.home", "here")])
    assert settings.worker.state == place / "data" / "state"
    assert settings.stack.home == place / "other" / "here"
    assert settings.accounts[0].secrets[1].get_secret_value() == "next-secret-3"


def test_every_mistake_is_named_at_once_with_its_line(place, monkeypatch):
    change(place, 'facility = "north"\nsecrets', 'facility = "nroth"\nsecrets')
    change(place, 'source = "till"', 'source = "tall"')
    change(place, 'time_zone = "America/New_York"', 'time_zone = "America/Boston"')
    change(place, 'default_authority = "HARBOR"', 'default_authority = "HARBOUR"')
    change(place, "port = 2600", "port = 99999")
    change(place, 'connector = "wire"', 'connector = "wire"\nstile = "fancy"\nstyle = "Fancy"')
    change(place, 'sending_facility = "N"\n', "")
    monkeypatch.setenv("REMITSTREAM_KAFKA__SECURITY_PROTOCOL", "TLS")
    monkeypatch.setenv("REMITSTREAM_KAFAK__BOOTSTRAP", "x")
    issues = fail(("worker.partitions", "many"))
    lines = (place / "remitstream.toml").read_text().splitlines()

    def at(text):
        return f"remitstream.toml:{lines.index(text) + 1}"

    assert {key: issue.place for key, issue in issues.items()} == {
        "accounts.north-card.facility": at('facility = "nroth"'),
        "accounts.north-card.source": at('source = "tall"'),
        "facilities.harbor.time_zone": at('time_zone = "America/Boston"'),
        "facilities.harbor.default_authority": at('default_authority = "HARBOUR"'),
        "targets.epic-north.port": at("port = 99999"),
        "targets.epic-north.stile": at('stile = "fancy"'),
        "targets.epic-north.style": at('style = "Fancy"'),
        "feeds.north-adt.sending_facility": at("[[feeds]]"),
        "kafka.security_protocol": "environment variable REMITSTREAM_KAFKA__SECURITY_PROTOCOL",
        "kafak": "environment variable REMITSTREAM_KAFAK__BOOTSTRAP",
        "worker.partitions": "flag --set worker.partitions",
    }
    assert issues["accounts.north-card.facility"].given == "'nroth'"
    assert issues["accounts.north-card.facility"].accepted == "harbor, north"
    assert issues["accounts.north-card.facility"].remedy == "Did you mean `north`?"
    assert issues["accounts.north-card.source"].accepted == "till"
    assert issues["facilities.harbor.default_authority"].remedy == "Did you mean `HARBOR`?"
    assert issues["targets.epic-north.stile"].remedy == "Did you mean `style`?"
    assert issues["targets.epic-north.style"].accepted == "plain, fancy"
    assert issues["targets.epic-north.port"].accepted == "less than or equal to 65535"
    assert issues["kafka.security_protocol"].accepted == "PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL"
    assert issues["kafak"].remedy == "Did you mean `kafka`?"
    assert issues["worker.partitions"].given == "'many'"


@pytest.mark.parametrize("literal", ['"whsec_literal"', '"env:whsec-literal"', '"vault:whsec_literal"', "[7]", "4711"])
@pytest.mark.parametrize("key", ["hmac", "account", "target"])
def test_a_literal_secret_is_refused_and_not_repeated(place, key, literal):
    old = {"hmac": '"env:T_HMAC"', "account": '"env:T_NORTH"', "target": '"env:T_WIRE"'}[key]
    change(place, old, literal)
    with pytest.raises(SettingsError) as caught:
        read_settings()
    told = str(caught.value) + repr(caught.value.list_issues())
    assert "literal" not in told.replace("a literal", "")
    assert "4711" not in told
    assert "env:NAME" in caught.value.issues[0].accepted
    assert caught.value.issues[0].place.startswith("remitstream.toml:")


def test_a_secret_under_a_misspelt_key_is_not_repeated(place):
    change(place, "[redis]\n", '[redis]\npasswort = "oops-secret"\n')
    issue = fail()["redis.passwort"]
    assert "oops-secret" not in str(issue)
    assert issue.remedy == "Did you mean `password`?"


def test_a_value_where_a_section_with_secrets_belongs_is_not_repeated(place):
    change(place, '[redis]\nurl = "redis://redis:6379/0"\n', "")
    change(place, "tenant =", 'redis = "redis://:oops-secret@redis"\ntenant =')
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert "oops-secret" not in str(caught.value)
    assert any(issue.key == "redis" for issue in caught.value.issues)


@pytest.mark.parametrize("url", ["https://me:oops-secret@registry", "https://me:oops-secret@registry:x"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(SettingsError) as caught:
        read_settings(None, [("registry.url", url)])
    assert "oops-secret" not in str(caught.value)
    assert caught.value.issues[0].key == "registry.url"


def test_missing_variables_and_files_are_named(place, monkeypatch):
    monkeypatch.delenv("T_NORTH")
    monkeypatch.setenv("T_WIRE", "")
    (place / "secrets" / "next.key").unlink()
    issues = fail()
    assert "T_NORTH" in issues["accounts.north-card.secrets.0"].problem
    assert str(place / "secrets" / "next.key") in issues["accounts.north-card.secrets.1"].problem
    assert "T_WIRE" in issues["targets.epic-north.password"].problem
    assert len(issues) == 3


def test_an_empty_secret_file_is_refused(place):
    (place / "secrets" / "next.key").write_text("\n")
    assert "empty" in fail()["accounts.north-card.secrets.1"].problem


def test_a_short_hmac_key_is_refused(monkeypatch):
    monkeypatch.setenv("T_HMAC", "k" * 31)
    assert fail()["secrets.hmac_key"].accepted == "at least 32 characters"


@pytest.mark.parametrize(
    ("addition", "key"),
    [
        ('[[facilities]]\nid = "north"\ntime_zone = "UTC"\ndefault_authority = "N2"\nauthorities = [{name = "N2"}]\n',
         "facilities.north.id"),
        ('[[accounts]]\nname = "north-card"\nsource = "till"\nfacility = "north"\nsecrets = ["env:T_NORTH"]\n',
         "accounts.north-card.name"),
        ('[[feeds]]\nname = "north-adt"\nfacility = "north"\nsending_application = "X"\nsending_facility = "Y"\n',
         "feeds.north-adt.name"),
        ('[[feeds]]\nname = "other"\nfacility = "harbor"\nsending_application = "ADT"\nsending_facility = "N"\n',
         "feeds.other"),
        ('[[targets]]\nname = "epic-north"\nconnector = "wire"\nfacilities = ["north"]\nport = 1\n',
         "targets.epic-north.name"),
        ('[[targets]]\nname = "t2"\nconnector = "wire"\nfacilities = ["north", "harbour"]\nport = 1\n',
         "targets.t2.facilities.1"),
        ('[[targets]]\nname = "t2"\nconnector = "wired"\nfacilities = ["north"]\n', "targets.t2.connector"),
        (('[[facilities]]\nid = "x"\ntime_zone = "UTC"\ndefault_authority = "X"\n'
         'authorities = [{name = "X", aliases = ["2.16.1"]}]\n'), "facilities.x.authorities.X.aliases.0"),
        (('[[facilities]]\nid = "x"\ntime_zone = "UTC"\ndefault_authority = "X"\n'
         'authorities = [{name = "X", aliases = ["1", "1"]}]\n'), "facilities.x.authorities.X.aliases.1"),
        ("[health]\nworker = 9999\nprojector = 9999\n", "health.projector"),
        ('[[feeds]]\nname = "f2"\nfacility = "harbr"\nsending_application = "X"\nsending_facility = "Y"\n',
         "feeds.f2.facility"),
        ('[receiver.tls]\ncertificate = "absent.pem"\nkey = "secrets/next.key"\n', "receiver.tls.certificate"),
    ],
)  # fmt: skip
def test_what_does_not_stand_together_is_refused(place, addition, key):
    with (place / "remitstream.toml").open("a") as file:
        file.write(addition)
    assert list(fail()) == [key]


def test_what_is_wrong_inside_an_overlay_is_named_with_its_line(place):
    change(place, 'time_zone = "America/Chicago"', 'time_zone = "America/Chicago"\nmapping_overlay = "north.yaml"')
    shipped = (Path(__file__).resolve().parents[2] / "examples" / "overlays" / "north.yaml").read_text()
    (place / "north.yaml").write_text(shipped)
    assert read_settings().facilities[0].mapping_overlay == str(place / "north.yaml")
    (place / "north.yaml").write_text(shipped + "planted: 1\n")
    [issue] = fail().values()
    assert issue.place == f"north.yaml:{len(shipped.splitlines()) + 1}"
    assert "planted" in issue.key


def test_one_authority_may_serve_two_facilities(place):
    with (place / "remitstream.toml").open("a") as file:
        file.write('[[facilities]]\nid = "x"\ntime_zone = "UTC"\ndefault_authority = "NORTH"\n'
                   'authorities = [{name = "NORTH", aliases = ["2.16.1"]}]\n')  # fmt: skip
    assert read_settings().facilities[2].default_authority == "NORTH"


def test_your_own_services_need_their_addresses(place):
    change(place, "[kafka]\nbootstrap", "[log]\nlevel = 'info'\n[kafka]\nsession_timeout_seconds")
    change(place, '"broker:9092"', "30")
    change(place, 'url = "http://registry"', "")
    issues = fail()
    assert set(issues) == {"kafka.bootstrap", "registry.url"}
    assert "REMITSTREAM_KAFKA__BOOTSTRAP" in issues["kafka.bootstrap"].remedy


def test_variables_of_other_programs_are_left_alone(monkeypatch):
    monkeypatch.setenv("REMITSTREAM_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("REMITSTREAM_PORT_8480_TCP", "tcp://10.0.0.1:8480")
    monkeypatch.setenv("REMITSTREAM_SHARED", "/somewhere")
    assert read_settings().tenant == "lakeshore"


def test_a_misspelt_variable_is_refused(monkeypatch):
    monkeypatch.setenv("REMITSTREAM_TENNANT", "x")
    assert fail()["tennant"].remedy == "Did you mean `tenant`?"


def test_a_section_given_whole_and_in_parts_is_refused(monkeypatch):
    monkeypatch.setenv("REMITSTREAM_TARGETS", "[]")
    monkeypatch.setenv("REMITSTREAM_TARGETS__EPIC_NORTH__PORT", "1")
    assert "beside" in fail()["targets.epic_north.port"].problem


def test_a_variable_that_is_not_json_is_named_and_not_repeated(monkeypatch):
    monkeypatch.setenv("REMITSTREAM_ACCOUNTS", '[{"secrets": ["oops-secret"]')
    issues = fail()
    assert issues["accounts"].place == "environment variable REMITSTREAM_ACCOUNTS"
    assert "oops-secret" not in " ".join(map(str, issues.values()))


def embed(place):
    change(place, '[kafka]\nbootstrap = "broker:9092"\n', "[stack]\nembedded = true\n")
    change(place, '[registry]\nurl = "http://registry"\n', "")
    change(place, '[redis]\nurl = "redis://redis:6379/0"\n', "")


def test_embedded_in_the_file_yields_to_an_address_of_higher_rank(place, monkeypatch):
    embed(place)
    assert read_settings().embedded is True
    monkeypatch.setenv("REMITSTREAM_KAFKA__BOOTSTRAP", "mine:9092")
    assert set(fail()) == {"registry.url", "redis.url"}
    monkeypatch.setenv("REMITSTREAM_REGISTRY__URL", "http://mine")
    monkeypatch.setenv("REMITSTREAM_REDIS__URL", "redis://mine")
    settings = read_settings()
    assert (settings.embedded, settings.kafka.bootstrap) == (False, "mine:9092")


def test_the_embedded_flag_drops_the_addresses_of_the_file():
    settings = read_settings(None, [("stack.embedded", "true")])
    assert settings.embedded is True
    assert settings.find_origin(("kafka", "bootstrap")) is None
    assert settings.kafka.bootstrap != "broker:9092"
    assert settings.redis.url != "redis://redis:6379/0"


def test_embedded_and_an_address_in_one_file_are_refused(place):
    change(place, "[kafka]\n", "[stack]\nembedded = true\n[kafka]\n")
    assert "kafka.bootstrap" in fail()


def test_override_keeps_the_embedded_mode_and_travels_to_other_processes(place):
    embed(place)
    settings = read_settings().override({"kafka.bootstrap": "127.0.0.1:5", "targets.epic-north.port": "7"})
    assert (settings.embedded, settings.kafka.bootstrap, settings.targets[0].port) == (True, "127.0.0.1:5", 7)
    arguments = settings.list_arguments()
    pairs = [tuple(text.split("=", 1)) for text in arguments[3::2]]
    again = read_settings(Path(arguments[1]), pairs)
    assert again.model_dump() == settings.model_dump()
    assert again.embedded is True


def test_secret_files_are_created_in_the_embedded_mode_only(place):
    (place / "secrets" / "next.key").unlink()
    assert ensure_secrets() == ()
    assert not (place / "secrets" / "next.key").exists()
    embed(place)
    change(place, '"env:T_HMAC"', '"file:deep/er/hmac.key"')
    created = ensure_secrets()
    assert set(created) == {place / "secrets" / "next.key", place / "deep" / "er" / "hmac.key"}
    for path in created:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(path.read_text().strip()) >= 32
    assert len({path.read_text() for path in created}) == 2
    before = [path.read_text() for path in created]
    assert ensure_secrets() == ()
    assert [path.read_text() for path in created] == before
    assert read_settings().embedded is True


def test_missing_secret_files_of_the_embedded_mode_name_their_maker(place):
    embed(place)
    (place / "secrets" / "next.key").unlink()
    assert "stack up" in fail()["accounts.north-card.secrets.1"].remedy


def test_settings_are_not_changed_after_reading():
    with pytest.raises(ValueError, match="frozen"):
        read_settings().tenant = "other"


def test_only_the_settings_read_the_environment():
    """By text. Downloads ask for the certificate bundle; children get the environment whole, unread."""
    root = Path(__file__).resolve().parents[2]
    packages = ("schemas", "topics", "telemetry", "clients", "identity", "sources", "streams", "sinks", "runtime")
    found = set()
    for package in packages:
        for path in (root / package).rglob("*.py"):
            text = path.read_text()
            if "os.environ" in text or "getenv" in text:
                found.add(str(path.relative_to(root)))
    assert found <= {"runtime/settings.py", "runtime/stack/download.py", "runtime/processes.py", "runtime/run.py"}
    assert "runtime/settings.py" in found


def test_reading_settings_does_not_import_kafka_streams():
    """`--help` and `config check` must stay quick: Faust is for the worker."""
    code = "import runtime.settings, sys; print('faust' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert told.stdout.strip() == "False"
