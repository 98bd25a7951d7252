"""What the worker relies on in Faust beyond its documented interface. Red means: read what changed in Faust first.

Faust calls what the transport overrides by name: a name that upstream renames is not an error there, but a method that
is never called again.
"""

import inspect
from importlib.metadata import version
from types import SimpleNamespace

import faust
import mode
import pytest
from faust.transport import consumer, producer
from faust.transport.drivers import aiokafka
from faust.types import ConsumerMessage

from runtime.roles import worker
from streams import app, transport

OURS = {"_announce"}
"""Methods of our classes that Faust never calls."""


def list_overrides(cls):
    return [name for name, member in vars(cls).items() if inspect.isfunction(member) and name not in OURS]


def list_parameters(function):
    return [
        (name, parameter.kind)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def test_the_release_is_the_one_whose_inside_was_read():
    assert version("faust-streaming").startswith("0.15."), "read its consumer, conductor and app before going on"


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (transport.BatchConsumer, consumer.Consumer),
        (transport.SilentProducer, producer.Producer),
        (transport.Unchanged, faust.Codec),
        (worker._FaustWorker, faust.Worker),
    ],
)
def test_everything_overridden_exists_and_takes_as_many_arguments(cls, base):
    assert list_overrides(cls), "nothing is overridden: this test looks at the wrong class"
    for name in list_overrides(cls):
        assert hasattr(base, name), f"{base.__name__}.{name} is gone: Faust does not call ours any more"
        ours = getattr(cls, name)
        if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(ours).parameters.values()):
            continue
        wanted = [kind for _, kind in list_parameters(getattr(base, name))]
        assert [kind for _, kind in list_parameters(ours)] == wanted, f"{base.__name__}.{name} takes other arguments"
        assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(getattr(base, name)), name


def test_no_abstract_method_is_left():
    assert not transport.BatchConsumer.__abstractmethods__
    assert not getattr(transport.SilentProducer, "__abstractmethods__", None)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (consumer.Consumer._getmany, ["self", "active_partitions", "timeout"]),
        (consumer.Consumer.getmany, ["self", "timeout"]),
        (consumer.Consumer._to_message, ["self", "tp", "record"]),
        (consumer.Consumer._drain_messages, ["self", "fetcher"]),
        (consumer.Consumer.on_partitions_assigned, ["self", "assigned", "generation_id"]),
        (faust.App.on_rebalance_start, ["self"]),
        (faust.App.crash, ["self", "reason"]),
        (faust.App.wait_until_stopped, ["self"]),
        (faust.serializers.codecs.register, ["name", "codec"]),
    ],
)
def test_what_is_called_or_calls_us_keeps_its_signature(function, names):
    assert [name for name, _ in list_parameters(function)] == names


def test_a_topic_can_go_without_acknowledgements():
    class Feeder:
        deciders = {"raw.stripe": SimpleNamespace(source="stripe")}  # noqa: RUF012 - read only

    built = app.Worker(Feeder()).app
    assert [agent.channel.acks for agent in built.agents.values()] == [False]
    assert "if channel.acks" in inspect.getsource(type(built.topics)), "the conductor does not ask for it any more"


def test_a_message_is_built_by_position():
    names = [name for name, _ in list_parameters(ConsumerMessage.__init__)][1:13]
    assert names == [
        "topic", "partition", "offset", "timestamp", "timestamp_type", "headers", "key", "value", "checksum",
        "serialized_key_size", "serialized_value_size", "tp",
    ]  # fmt: skip
    assert "generation_id" in inspect.signature(ConsumerMessage.__init__).parameters


def test_messages_of_another_generation_are_still_skipped_so_ours_carry_the_current_one():
    assert "consumer_generation_id" in inspect.getsource(consumer.Consumer.getmany)
    assert faust.App("contract", broker="kafka://nowhere").consumer_generation_id == 0


def test_the_transport_makes_the_classes_it_names():
    assert set(vars(transport.Transport)) & {"Consumer", "Producer"} == {"Consumer", "Producer"}
    for name in ("Consumer", "Producer"):
        assert hasattr(aiokafka.Transport, name), f"Transport.{name} is gone: Faust makes another one"
        assert f"self.{name}(" in inspect.getsource(faust.transport.base.Transport)


def test_the_app_has_no_web_server_no_tables_and_no_topics_of_its_own():
    class Feeder:
        deciders = {}  # noqa: RUF012 - read only

    conf = app.Worker(Feeder()).app.conf
    assert conf.agent_supervisor is mode.CrashingSupervisor, "an agent that fails would start anew behind our back"
    assert conf.web_enabled is False
    assert conf.topic_allow_declare is False
    assert conf.topic_disable_leader is True
    assert conf.reply_create_topic is False
    assert conf.table_standby_replicas == 0
    assert str(conf.store) == "memory:"
    assert conf.stream_wait_empty is False
    for name in ("web_router_enabled", "web_tables_enabled", "stream_buffer_maxsize", "datadir"):
        assert name in faust.types.settings.Settings.SETTINGS, f"Faust does not know the setting {name} any more"
