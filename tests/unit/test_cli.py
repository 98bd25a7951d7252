import json
import os
import re
import shutil
from pathlib import Path

import pytest

from runtime import cli, command_steps, desk_commands, installation
from runtime.commands import stack as stack_commands
from runtime.commands.config import HIDDEN
from sandbox.plan import FEWEST_EVENTS
from schemas.failure import ConfigurationError, TemporaryError

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = """\
tenant = "lakeshore"

[[facilities]]
id = "north"
time_zone = "America/Chicago"
default_authority = "NORTH"
authorities = [{ name = "NORTH" }]

[secrets]
hmac_key = "env:T_HMAC"

[kafka]
bootstrap = "broker:9092"
security_protocol = "SASL_SSL"
sasl_mechanism = "SCRAM-SHA-512"
sasl_username = "remitstream"
sasl_password = "env:T_KAFKA"

[registry]
url = "http://registry"

[redis]
url = "redis://redis:6379/0"
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith("REMITSTREAM_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("T_HMAC", "hmac-secret-" * 4)
    monkeypatch.setenv("T_KAFKA", "kafka-secret-value")
    (tmp_path / "remitstream.toml").write_text(MINIMAL)
    return tmp_path


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


@pytest.fixture
def bodies(monkeypatch):
    """Stands for the modules behind the commands: records each call and answers what the test says."""
    calls = []
    answers = {}

    def load(module, function):
        def body(*arguments, **options):
            calls.append((module, function, arguments, options))
            answer = answers.get(module, 0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return body

    monkeypatch.setattr(command_steps, "load", load)
    return calls, answers


def list_commands(group, path=()):
    for command in group.registered_commands:
        yield (*path, command.name or command.callback.__name__), command
    for below in group.registered_groups:
        yield from list_commands(below.typer_instance, (*path, below.name))


COMMANDS = dict(list_commands(cli.app))


def test_every_promised_command_is_there():
    assert {" ".join(path) for path in COMMANDS} == {
        "receive", "listen", "worker", "project", "deliver", "sandbox", "run", "trace", "account", "init", "tables",
        "topics list", "topics apply", "topics check", "topics move-frontier", "schemas check", "schemas register",
        "stack up", "stack down", "stack status", "stack reset", "config check", "config show", "mapping check",
        "connectors", "dlq list", "dlq group", "dlq show", "dlq redrive", "dlq edit", "dlq waive", "dlq approve",
        "unknown list", "unknown show", "unknown decide", "reviews list", "reviews show", "reviews decide",
        "reviews approve", "audit list", "audit verify",
    }  # fmt: skip


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_that_parses(path, call):
    code, out, _ = call(*path, "--help")
    assert code == 0
    words = " ".join(out.split())
    example = re.search(r"Example: remitstream (.+)$", words)
    assert example is not None
    given = example[1].split()
    assert tuple(given[: len(path)]) == path
    for option in (word for word in given if word.startswith("--")):
        assert option in out.split("Example:")[0]


def test_version(call):
    code, out, _ = call("--version")
    assert (code, out) == (0, f"remitstream {installation.read_version()}\n")


@pytest.mark.parametrize(
    "arguments",
    [("config", "chek"), ("receive", "--set", "novalue"), ("receive", "--unknown"), ("trace",), ()],
)
def test_wrong_usage_exits_2(call, arguments):
    assert call(*arguments)[0] == 2


def test_account_refuses_what_is_no_time(call):
    assert call("account", "--since", "yesterday")[0] == 2


# ---------------------------------------------------------------- configuration


def test_config_check_of_a_correct_file(call):
    code, out, _ = call("config", "check", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["valid"], told["file"], told["facilities"], told["embedded"]) == (
        True, "remitstream.toml", ["north"], False,
    )  # fmt: skip
    assert call("config", "check")[0] == 0


QUICKBOOKS = """\

[[targets]]
name = "books-north"
connector = "quickbooks_online"
facilities = ["north"]
environment = "sandbox"
client_id = "ABclient"
client_secret = "env:T_CLIENT"
refresh_token = "file:secrets/refresh.token"
token_folder = "tokens"
realm = "4620816365"
home_currency = "USD"
customer = "58"
deposit_account = "35"
refund_item = "19"
other_movements = "skip"
"""


def test_config_check_of_a_target_over_http(call, place, monkeypatch):
    (place / "remitstream.toml").write_text(MINIMAL + QUICKBOOKS)
    code, _, err = call("config", "check")
    assert code == 78
    assert "T_CLIENT" in err
    assert "refresh.token" in err
    monkeypatch.setenv("T_CLIENT", "planted-client-secret")
    (place / "secrets").mkdir()
    (place / "secrets" / "refresh.token").write_text("planted-refresh-token\n")
    # Nothing may start without the key that seals the next refresh token.
    for command in (("config", "check"), ("deliver",), ("deliver", "books-north")):
        code, _, err = call(*command)
        assert code == 78
        assert re.search(r"secrets\.vault_key: missing: .*targets\.books-north", err)
        assert "openssl rand -hex 32" in err
    sealed = MINIMAL.replace("[kafka]", 'vault_key = "env:T_VAULT"\n\n[kafka]', 1)
    (place / "remitstream.toml").write_text(sealed + QUICKBOOKS)
    monkeypatch.setenv("T_VAULT", "planted-too-short")
    code, _, err = call("config", "check")
    assert code == 78
    assert re.search(r"secrets\.vault_key: too short", err)
    assert "planted" not in err
    monkeypatch.setenv("T_VAULT", "planted-" * 4)
    assert call("config", "check")[0] == 0
    _, shown, _ = call("config", "show")
    assert str(place / "tokens") in shown
    assert "planted" not in shown
    (place / "remitstream.toml").write_text(MINIMAL + QUICKBOOKS.replace("env:T_CLIENT", "planted-client-secret"))
    code, _, err = call("config", "check")
    assert code == 78
    assert "planted" not in err


def test_config_check_lists_issues_with_code_place_and_remedy(call, place):
    (place / "remitstream.toml").write_text(
        MINIMAL.replace("America/Chicago", "Chicago").replace("[redis]", "[rediss]")
    )
    code, out, err = call("config", "check")
    assert code == 78
    assert out == ""
    assert err.startswith("RS101 at remitstream.toml\n")
    assert "remitstream.toml:5: facilities.north.time_zone" in err
    assert "Did you mean `redis`?" in err
    code, out, _ = call("config", "check", "--json")
    told = json.loads(out)
    assert (code, told["valid"], told["code"]) == (78, False, "RS101")
    assert {issue["key"] for issue in told["issues"]} == {"facilities.north.time_zone", "rediss", "redis.url"}


@pytest.mark.parametrize(("text", "error"), [(None, "RS102"), ("a = ", "RS103")])
def test_a_file_that_is_missing_or_no_toml(call, place, text, error):
    (place / "remitstream.toml").unlink()
    if text is not None:
        (place / "remitstream.toml").write_text(text)
    code, _, err = call("config", "check")
    assert code == 78
    assert err.startswith(error)
    code, out, _ = call("config", "check", "--json")
    assert code == 78
    assert json.loads(out)["code"] == error


def test_fewer_events_than_traffic_can_be_made_of_are_wrong_usage(call):
    code, _, err = call("run", "--events", str(FEWEST_EVENTS - 1))
    assert code == 2
    assert "--events" in err
    assert str(FEWEST_EVENTS) in err


def test_config_show_tells_values_and_origins_and_no_secret(call, monkeypatch):
    monkeypatch.setenv("REMITSTREAM_WORKER__PARTITIONS", "8")
    arguments = ("config", "show", "--set", "receiver.port=9000")
    code, text, _ = call(*arguments)
    assert code == 0
    told = json.loads(call(*arguments, "--json")[1])
    assert told["worker.partitions"] == {
        "value": 8, "origin": "environment", "place": "environment variable REMITSTREAM_WORKER__PARTITIONS",
    }  # fmt: skip
    assert (told["receiver.port"]["value"], told["receiver.port"]["origin"]) == (9000, "flag")
    assert told["facilities.north.time_zone"] == {
        "value": "America/Chicago", "origin": "file", "place": "remitstream.toml:5",
    }  # fmt: skip
    assert told["log.level"] == {"value": "info", "origin": "default", "place": ""}
    assert told["secrets.hmac_key"]["value"] == f"env:T_HMAC {HIDDEN}"
    assert told["kafka.sasl_password"]["value"] == f"env:T_KAFKA {HIDDEN}"
    assert "worker.partitions = 8   [environment: environment variable REMITSTREAM_WORKER__PARTITIONS]" in text
    for shown in (text, json.dumps(told)):
        assert "hmac-secret" not in shown
        assert "kafka-secret-value" not in shown


def test_init_writes_a_file_that_passes_config_check(call, place, monkeypatch):
    target = place / "new" / "remitstream.toml"
    assert call("init", str(target))[0] == 0
    code, _, err = call("config", "check", "--config", str(target))
    assert code == 78
    assert "RS_HMAC_KEY" in err
    assert "RS_STRIPE_SECRET" in err
    assert err.startswith("RS101")
    assert "\n2 settings are wrong" in err
    monkeypatch.setenv("RS_HMAC_KEY", "0" * 64)
    monkeypatch.setenv("RS_STRIPE_SECRET", "whsec_test")
    code, _, err = call("config", "check", "--config", str(target))
    assert (code, err) == (0, "")


def test_the_defaults_that_the_template_shows_are_the_defaults(call, place, monkeypatch):
    monkeypatch.setenv("RS_HMAC_KEY", "0" * 64)
    monkeypatch.setenv("RS_STRIPE_SECRET", "whsec_test")
    call("init", "new.toml")
    shown = json.loads(call("config", "show", "--json", "--config", "new.toml")[1])
    section = ""
    checked = 0
    for line in (place / "new.toml").read_text().splitlines():
        header = re.fullmatch(r"(?:# )?\[([\w.]+)\]", line)
        section = header[1] if header else section
        default = re.match(r"# (\w+) = ([^#]+)", line)
        if default and section in ("receiver", "listener", "worker", "log"):
            value = shown[f"{section}.{default[1]}"]["value"]
            assert str(value).endswith(default[2].strip().strip('"'))
            checked += 1
    assert checked == 8


def test_init_never_writes_over_a_file(call, place):
    code, _, err = call("init")
    assert code == 78
    assert err.startswith("RS105")
    assert (place / "remitstream.toml").read_text() == MINIMAL


def test_the_example_passes_config_check_once_its_secrets_are_made(call, place, bodies):
    shutil.copytree(ROOT / "examples", place / "examples", ignore=shutil.ignore_patterns(".remitstream"))
    example = "examples/three-facilities.toml"
    assert call("config", "check", "--config", example)[0] == 78
    code, _, err = call("run", "--config", example)
    assert code == 0
    assert len(list((place / ".remitstream" / "secrets").iterdir())) == 5
    assert err.count("created .remitstream/secrets/") == 5
    code, out, _ = call("config", "check", "--json", "--config", example)
    told = json.loads(out)
    assert (code, told["embedded"]) == (0, True)
    assert told["facilities"] == ["north", "harbor", "valley"]
    assert told["targets"] == ["epic-north", "epic-harbor", "epic-valley"]


def test_mapping_check(call, place):
    shipped = ROOT / "examples" / "overlays" / "north.yaml"
    assert call("mapping", "check", str(shipped))[0] == 0
    broken = place / "broken.yaml"
    broken.write_text(shipped.read_text() + "planted: 1\n")
    code, _, err = call("mapping", "check", str(broken))
    assert code == 78
    assert err.startswith("RS160")
    code, out, _ = call("mapping", "check", str(broken), "--json")
    told = json.loads(out)
    assert (code, told["valid"]) == (78, False)
    assert told["problems"][0]["field"] == "planted"


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("arguments", "module", "options"),
    [
        (("receive",), "runtime.roles.receiver", {}),
        (("listen",), "runtime.roles.listener", {}),
        (("worker", "--slot", "2"), "runtime.roles.worker", {"slot": 2}),
        (("project",), "runtime.roles.projector", {}),
        (("sandbox",), "runtime.roles.sandbox", {}),
    ],
)
@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_process_command_runs_its_role_and_passes_its_exit_code_on(call, bodies, arguments, module, options, code):
    calls, answers = bodies
    answers[module] = code
    assert call(*arguments, "--set", "receiver.port=1")[0] == code
    [(called, function, given, named)] = calls
    assert (called, function, named) == (module, "run", options)
    assert given[0].receiver.port == 1


def test_deliver_takes_targets_of_the_configuration(call, bodies, place):
    shutil.copytree(ROOT / "examples", place / "examples", ignore=shutil.ignore_patterns(".remitstream"))
    example = ("--config", "examples/three-facilities.toml", "--set", "kafka.bootstrap=127.0.0.1:1", "--embedded")
    call("run", *example[:2])
    calls, _ = bodies
    calls.clear()
    assert call("deliver", *example)[0] == 0
    assert call("deliver", "epic-valley", *example)[0] == 0
    assert [given[1] for _, _, given, _ in calls] == [("epic-north", "epic-harbor", "epic-valley"), ("epic-valley",)]
    code, _, err = call("deliver", "epic-vally", *example)
    assert code == 78
    assert "Did you mean `epic-valley`?" in err


def test_run_passes_its_options_on(call, bodies):
    calls, _ = bodies
    assert call("run", "--once", "--report", "r.json", "--events", "700", "--set", "sandbox.seed=5")[0] == 0
    [(module, _, _, options)] = calls
    assert module == "runtime.run"
    assert options == {"once": True, "report": Path("r.json"), "events": 700, "seed": 5}


@pytest.mark.parametrize(("balanced", "code"), [(True, 0), (False, 1)])
def test_account_exits_1_unless_the_books_balance(call, bodies, balanced, code):
    calls, answers = bodies
    answers["runtime.account"] = {"accepted": 9, "balanced": balanced}
    ended, out, _ = call("account", "--since", "2026-03-01T00:00:00", "--json")
    assert ended == code
    assert json.loads(out) == {"accepted": 9, "balanced": balanced}
    assert calls[0][2][1].isoformat() == "2026-03-01T00:00:00+00:00"


def test_topics_check_exits_1_when_something_differs(call, bodies):
    calls, answers = bodies
    answers["topics.provision"] = ["payments: missing"]
    code, out, _ = call("topics", "check", "--json")
    assert (code, json.loads(out)) == (1, {"problems": ["payments: missing"]})
    assert calls[0][3] == {"partitions": 4, "embedded": False}
    answers["topics.provision"] = []
    assert call("topics", "check")[0] == 0


def test_topics_list_needs_no_broker(call):
    code, out, _ = call("topics", "list", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["payments"]["phi"] is True
    assert told["payments"]["partitions"] == 4
    assert "raw.hl7" in told


# ---------------------------------------------------------------- embedded stack


def test_stack_commands_refuse_your_own_services(call):
    code, _, err = call("stack", "status")
    assert code == 78
    assert err.startswith("RS106")


def test_a_process_needs_the_embedded_stack_up(call, bodies):
    code, _, err = call("receive", "--embedded", "--set", "stack.home=nowhere")
    assert code == 75
    assert err.startswith("RS290")
    assert "stack up" in err
    assert bodies[0] == []


def test_a_process_uses_the_addresses_of_the_running_stack(call, bodies, monkeypatch):
    addresses = stack_commands.StackAddresses("127.0.0.1:11", "http://127.0.0.1:12/v7", "redis://127.0.0.1:13/0")

    class Running:
        def __init__(self, home, cache, *, mirror):
            self.home = home

        def status(self):
            return {}

        def read_addresses(self):
            return addresses

    monkeypatch.setattr(stack_commands, "EmbeddedStack", Running)
    assert call("receive", "--embedded")[0] == 0
    settings = bodies[0][0][2][0]
    assert (settings.kafka.bootstrap, settings.registry.url, settings.redis.url) == (
        "127.0.0.1:11", "http://127.0.0.1:12/v7", "redis://127.0.0.1:13/0",
    )  # fmt: skip
    assert settings.embedded is True


# ---------------------------------------------------------------- errors


class PlantedError(TemporaryError):
    code = "RS999"
    default_remedy = "Wait."


def test_an_operator_error_is_told_whole_with_its_exit_code(call, bodies):
    bodies[1]["runtime.roles.receiver"] = PlantedError("Not there.", place="port 1")
    code, out, err = call("receive")
    assert (code, out, err) == (75, "", "RS999 at port 1\nNot there.\nRemedy: Wait.\n")


def test_an_operator_error_as_json(call, bodies):
    bodies[1]["runtime.trace"] = PlantedError("Not there.", place="port 1")
    code, out, err = call("trace", "x", "--json")
    assert (code, err) == (75, "")
    assert json.loads(out)["error"] == {
        "code": "RS999", "place": "port 1", "detail": "Not there.", "remedy": "Wait.", "exit_code": 75,
    }  # fmt: skip


def test_an_unexpected_exception_shows_type_and_place_and_no_value(call, bodies):
    bodies[1]["runtime.roles.receiver"] = ValueError("Jane Doe 4111111111111111")
    code, out, err = call("receive")
    assert code == 1
    assert "ValueError" in err
    assert "test_cli.py" in err
    assert "Jane" not in err + out
    assert "4111" not in err + out
    assert "Traceback" not in err


# ---------------------------------------------------------------- installation


def test_all_our_packages_are_ours():
    installation.check_packages()


def test_a_package_of_another_distribution_is_refused(tmp_path, monkeypatch, call):
    (tmp_path / "planted_package").mkdir()
    (tmp_path / "planted_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigurationError) as caught:
        installation.check_packages(["runtime", "planted_package"])
    assert caught.value.code == "RS104"
    assert str(tmp_path / "planted_package") in caught.value.detail
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    monkeypatch.setattr(installation.check_packages, "__defaults__", (("schemas",), tmp_path))
    code, _, err = call("--version")
    assert code == 78
    assert err.startswith("RS104 at schemas")


def test_a_package_that_is_not_there_is_refused():
    with pytest.raises(ConfigurationError):
        installation.check_packages(["absent_package_of_ours"])


@pytest.mark.parametrize(("deliverer", "code"), [("taken", 0), ("waiting", 75), ("refused: OVERTAKEN", 1)])
def test_a_decision_that_did_not_count_is_no_success(monkeypatch, capsys, deliverer, code):
    told = {"decision": "7/e1", "deliverer": deliverer, "overtaken_by": {"by": "Grace", "time": "2026-03-01T22:00:00Z"}}
    monkeypatch.setattr(desk_commands, "_open", lambda *_, **__: None)
    monkeypatch.setattr(desk_commands.steps, "load", lambda *_: lambda *_, **__: told)
    with pytest.raises(SystemExit) as caught:
        cli.main(["unknown", "decide", "e1", "--target", "epic", "--posted", "--by", "Ada", "--why", "T", "--json"])
    assert caught.value.code == code
    assert json.loads(capsys.readouterr().out) == told
