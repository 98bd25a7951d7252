"""Commands about the services underneath: ``topics``, ``schemas`` and ``stack``."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from runtime import command_steps as steps
from runtime import output
from runtime.command_steps import Assignments, Config, Embedded, Json
from schemas.failure import ExitCode

topics_app = typer.Typer(help="The topics of this deployment.", no_args_is_help=True)
schemas_app = typer.Typer(help="The event schemas in the registry.", no_args_is_help=True)
stack_app = typer.Typer(help="The embedded Kafka, registry and Redis.", no_args_is_help=True)

# ---------------------------------------------------------------- topics and schemas


@topics_app.command("list", epilog="Example: remitstream topics list --json")
def list_topics(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """List the topics, what they hold and for how long."""
    settings = steps.open_settings(config, assignments, embedded=embedded)
    topics = {
        topic.name: {
            "purpose": topic.purpose,
            "key": topic.key,
            "schema": topic.schema,
            "partitions": topic.partitions or settings.worker.partitions,
            "cleanup": topic.cleanup,
            "retention_ms": topic.retention_ms,
            "phi": topic.phi,
        }
        for topic in settings.topics
    }
    output.print_data(topics, as_json=as_json)


@topics_app.command("apply", epilog="Example: remitstream topics apply --config remitstream.toml")
def apply_topics(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """Create what is missing and set what differs; a partition count is never changed."""
    settings = steps.open_attached(config, assignments, embedded=embedded)
    apply = steps.load("topics.provision", "apply")
    changes = apply(settings.kafka, settings.topics, partitions=settings.worker.partitions, embedded=settings.embedded)
    output.print_data({"changes": changes}, as_json=as_json)


@topics_app.command("check", epilog="Example: remitstream topics check --json")
def check_topics(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """Compare the cluster with the catalog. Exits 1 when anything differs."""
    settings = steps.open_attached(config, assignments, embedded=embedded)
    check = steps.load("topics.provision", "check")
    problems = check(settings.kafka, settings.topics, partitions=settings.worker.partitions, embedded=settings.embedded)
    output.print_data({"problems": problems}, as_json=as_json)
    steps.exit_with(ExitCode.FAILED if problems else ExitCode.OK)


@topics_app.command(
    "move-frontier",
    epilog="Example: remitstream topics move-frontier --group remitstream.worker --topic raw.stripe --partition 3",
)
def move_frontier(
    *,
    group: Annotated[str, typer.Option("--group", help="Consumer group, for example remitstream.worker.")],
    topic: Annotated[str, typer.Option("--topic", help="Topic the group reads.")],
    partition: Annotated[int, typer.Option("--partition", min=0)],
    to: Annotated[int | None, typer.Option("--to", min=0, help="Next offset; default: the log's start.")] = None,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Set where a stopped group goes on in a partition, after records were lost below its frontier."""
    settings = steps.open_attached(config, assignments, embedded=embedded)
    old, new = steps.load("topics.frontier", "move_frontier")(settings.kafka, group, topic, partition, to)
    output.print_data({"old": old, "new": new}, as_json=as_json)


@schemas_app.command("check", epilog="Example: remitstream schemas check")
def check_schemas(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """Whether every schema in force is registered, or at least compatible."""
    settings = steps.open_attached(config, assignments, embedded=embedded)
    registry = steps.load("topics.registry", "Registry")(settings.registry)
    output.print_data(
        {"schemas": steps.load("topics.registry", "find_ids")(registry, settings.topics)}, as_json=as_json
    )


@schemas_app.command("register", epilog="Example: remitstream schemas register")
def register_schemas(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """Register every schema; nothing is changed when one would break older readers."""
    settings = steps.open_attached(config, assignments, embedded=embedded)
    registry = steps.load("topics.registry", "Registry")(settings.registry)
    output.print_data(
        {"schemas": steps.load("topics.registry", "register_schemas")(registry, settings.topics)}, as_json=as_json
    )


# ---------------------------------------------------------------- embedded stack


@stack_app.command("up", epilog="Example: remitstream stack up --config examples/three-facilities.toml")
def start_stack(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """Download what is missing, start all three and wait until they answer. They stay up."""
    commands = importlib.import_module("runtime.commands.stack")
    stack = commands.open_stack(steps.open_settings(config, assignments, embedded=embedded, create_secrets=True))
    output.print_data(stack.up(commands.LineProgress()), as_json=as_json)


@stack_app.command("down", epilog="Example: remitstream stack down")
def stop_stack(*, config: Config = None, assignments: Assignments = None, embedded: Embedded = None) -> None:
    """Stop all three; data stays."""
    steps.open_stack(config, assignments, embedded=embedded).down()


@stack_app.command("reset", epilog="Example: remitstream stack reset")
def reset_stack(*, config: Config = None, assignments: Assignments = None, embedded: Embedded = None) -> None:
    """Stop all three and remove their data; downloads stay."""
    steps.open_stack(config, assignments, embedded=embedded).reset()


@stack_app.command("status", epilog="Example: remitstream stack status --json")
def show_stack(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """What each component does. Exits 75 unless all are running."""
    states = importlib.import_module("runtime.commands.stack").describe(
        steps.open_stack(config, assignments, embedded=embedded)
    )
    output.print_data(states, as_json=as_json)
    steps.exit_with(ExitCode.OK if all(part["state"] == "running" for part in states.values()) else ExitCode.RETRY)
