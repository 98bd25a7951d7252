"""The command line. Parsing, printing and exit codes only; the work is in ``runtime.commands`` and ``runtime.roles``.

Modules of the work are imported when their command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import datetime as dt
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runtime import command_steps as steps
from runtime import installation, output
from runtime.command_steps import Assignments, Config, Embedded, Json
from runtime.configuration import MissingFileError, SettingsError, SyntaxIssueError, show_path
from runtime.desk_commands import audit_app, dlq_app, reviews_app, unknown_app
from runtime.layers import suggest
from runtime.service_commands import schemas_app, stack_app, topics_app
from schemas.failure import ConfigurationError, ExitCode, OperatorError

if TYPE_CHECKING:
    pass

EPILOG = "Exit codes: 0 done, 1 failed, 2 wrong usage, 75 try again, 78 wrong configuration."

app = typer.Typer(
    name="remitstream",
    help="Money facts between payment gateways and healthcare systems over Kafka.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="The configuration file.", no_args_is_help=True)
mapping_app = typer.Typer(help="Mapping files.", no_args_is_help=True)
for name, group in (
    ("topics", topics_app), ("schemas", schemas_app), ("stack", stack_app), ("config", config_app),
    ("mapping", mapping_app), ("dlq", dlq_app), ("unknown", unknown_app), ("reviews", reviews_app),
    ("audit", audit_app),
):  # fmt: skip
    app.add_typer(group, name=name)


class UnknownTargetError(ConfigurationError):
    """A target is named on the command line that the configuration does not have."""

    code = "RS107"
    meaning = "A command names a target instance that is not in the configuration."
    default_remedy = "Use a name from `[[targets]]`; `remitstream config check` lists them."


# ---------------------------------------------------------------- processes


@app.command(epilog="Example: remitstream receive --config remitstream.toml")
def receive(*, config: Config = None, assignments: Assignments = None, embedded: Embedded = None) -> None:
    """Take webhooks in: verify, redact, publish, then answer."""
    steps.run_role("receiver", steps.open_attached(config, assignments, embedded=embedded))


@app.command(epilog="Example: remitstream listen --config remitstream.toml")
def listen(*, config: Config = None, assignments: Assignments = None, embedded: Embedded = None) -> None:
    """Take HL7 v2 messages in over MLLP."""
    steps.run_role("listener", steps.open_attached(config, assignments, embedded=embedded))


@app.command(epilog="Example: remitstream worker --processes 4 --set worker.instance=host-a")
def worker(
    *,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, max=64, help="Start this many, restart those that end, stop them together."),
    ] = None,
    slot: Annotated[
        int | None,
        typer.Option("--slot", min=0, max=63, help="Be one worker, with this number on this host; default 0."),
    ] = None,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
) -> None:
    """Turn raw records into canonical events."""
    if processes is not None and slot is not None:
        raise typer.BadParameter("give --processes or --slot, not both", param_hint="--processes")
    settings = steps.open_attached(config, assignments, embedded=embedded)
    if processes is None:
        steps.run_role("worker", settings, slot=slot or 0)
    else:
        steps.run_role("workers", settings, processes)


@app.command(epilog="Example: remitstream project --config remitstream.toml")
def project(*, config: Config = None, assignments: Assignments = None, embedded: Embedded = None) -> None:
    """Keep the patient look-up in Redis up to date."""
    steps.run_role("projector", steps.open_attached(config, assignments, embedded=embedded))


@app.command(epilog="Example: remitstream deliver epic-north epic-harbor")
def deliver(
    *,
    targets: Annotated[list[str] | None, typer.Argument(help="Target instances; none means all.")] = None,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
) -> None:
    """Post canonical events to target systems."""
    settings = steps.open_attached(config, assignments, embedded=embedded)
    known = [target.name for target in settings.targets]
    for target in targets or ():
        if target not in known:
            raise UnknownTargetError(
                f"there is no such target; known are: {', '.join(known) or 'none'}.",
                place=target,
                remedy=suggest(target, known),
            )
    steps.run_role("deliverer", settings, tuple(targets or known))


@app.command(epilog="Example: remitstream sandbox --config examples/three-facilities.toml")
def sandbox(*, config: Config = None, assignments: Assignments = None, embedded: Embedded = None) -> None:
    """Run the simulated billing systems of all targets."""
    steps.run_role("sandbox", steps.open_settings(config, assignments, embedded=embedded))


@app.command(
    epilog="Example: remitstream run --once --report report.json --events 2000 --config examples/three-facilities.toml"
)
def run(
    *,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    once: Annotated[bool, typer.Option("--once", help="End when all traffic is settled.")] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write the JSON report there.")
    ] = None,
    events: Annotated[
        int | None,
        typer.Option("--events", min=200, help="Webhooks and HL7 messages to send, about; default `sandbox.events`."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of the traffic; default `sandbox.seed`.")
    ] = None,
) -> None:
    """Bring everything up on this machine, drive sample traffic through and show it."""
    settings = steps.open_settings(config, assignments, embedded=embedded, create_secrets=True)
    body = steps.load("runtime.run", "run")
    steps.exit_with(
        body(
            settings,
            once=once,
            report=report,
            events=settings.sandbox.events if events is None else events,
            seed=settings.sandbox.seed if seed is None else seed,
        )
    )


# ---------------------------------------------------------------- questions


@app.command(epilog="Example: remitstream trace pi_3MtwBwLkdIwHu7ix28a3tqPa")
def trace(
    *,
    identifier: Annotated[str, typer.Argument(metavar="ID", help="Event id, or the gateway's transaction id.")],
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Tell one event's story from raw record to outcome."""
    settings = steps.open_attached(config, assignments, embedded=embedded)
    story = steps.load("runtime.trace", "trace")(settings, identifier)
    if as_json:
        output.print_data(story, as_json=True)
    else:
        typer.echo("\n".join(steps.load("runtime.trace", "render")(story)))


@app.command(epilog="Example: remitstream account --since 2026-03-01T00:00:00Z")
def account(
    *,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="ISO 8601; count raw records received from then on.")
    ] = None,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Balance the books: what was accepted, and what became of it. Exits 1 when anything is lost or twice."""
    moment = _parse_time(since) if since is not None else None
    settings = steps.open_attached(config, assignments, embedded=embedded)
    balance = steps.load("runtime.account", "account")(settings, moment)
    output.print_data(balance, as_json=as_json)
    steps.exit_with(ExitCode.OK if balance["balanced"] else ExitCode.FAILED)


# ---------------------------------------------------------------- configuration


@config_app.command("check", epilog="Example: remitstream config check --config remitstream.toml")
def check_config(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """Name every wrong setting at once, with line, accepted values and remedy. Nothing is started or changed."""
    commands = importlib.import_module("runtime.commands.config")
    try:
        settings = steps.open_settings(config, assignments, embedded=embedded)
    except (SettingsError, MissingFileError, SyntaxIssueError) as error:
        if not as_json:
            raise
        issues = error.list_issues() if isinstance(error, SettingsError) else [_describe_issue(error)]
        output.print_data({"valid": False, "code": error.code, "issues": issues}, as_json=True)
        steps.exit_with(error.exit_code)
    else:
        output.print_data(commands.summarise(settings), as_json=as_json)


@config_app.command("show", epilog="Example: remitstream config show --json")
def show_config(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """Print every effective setting with its origin. Secrets are shown by reference only."""
    commands = importlib.import_module("runtime.commands.config")
    entries = commands.list_settings(steps.open_settings(config, assignments, embedded=embedded))
    if as_json:
        output.print_data(entries, as_json=True)
    else:
        typer.echo(commands.render_settings(entries))


@app.command(epilog="Example: remitstream init remitstream.toml")
def init(
    *,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path("remitstream.toml"),
) -> None:
    """Write a configuration file with comments. Never writes over a file."""
    written = importlib.import_module("runtime.commands.config").write_template(path)
    typer.echo(f"Wrote {show_path(written)}. Set the variables it names, then run `remitstream config check`.")


@app.command(epilog="Example: remitstream connectors --set connectors.targets=our-targets")
def connectors(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """List gateways and targets, those of your own folder too, and the hosts they call."""
    settings = steps.open_settings(config, assignments, embedded=embedded)
    output.print_data(steps.load("runtime.commands.connectors", "list_connectors")(settings), as_json=as_json)


@mapping_app.command("check", epilog="Example: remitstream mapping check streams/mappings/stripe.yaml")
def check_mappings(
    *,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Mapping or overlay files.")],
    as_json: Json = False,
) -> None:
    """Check mapping files against the event schema and run their examples."""
    commands = importlib.import_module("runtime.commands.mapping")
    problems = commands.check(files)
    if problems and not as_json:
        raise steps.load("schemas.mapping", "MappingError")(problems)
    output.print_data(commands.summarise(files, problems), as_json=as_json)
    steps.exit_with(ExitCode.CONFIGURATION if problems else ExitCode.OK)


@app.command(epilog="Example: remitstream tables --check")
def tables(
    *,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 when a file is stale.")] = False,
    folder: Annotated[Path, typer.Option("--root", metavar="FOLDER", help="The source tree.")] = Path(),
) -> None:
    """Write the generated documents (errors, settings, topics, connectors)."""
    changed = steps.load("runtime.tables", "check" if check else "write")(folder)
    typer.echo("\n".join(f"wrote {path}" for path in changed) or "All generated documents are up to date.")


# ---------------------------------------------------------------- shared steps


@app.callback(invoke_without_command=True)
def answer_version(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Money facts between payment gateways and healthcare systems over Kafka."""
    if version:
        typer.echo(f"remitstream {installation.read_version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


def _parse_time(text: str) -> dt.datetime:
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("give an ISO 8601 time, such as 2026-03-01T00:00:00Z", param_hint="--since") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=dt.UTC)


def _describe_issue(error: OperatorError) -> dict[str, str]:
    return {
        "key": "",
        "place": error.place,
        "problem": error.detail,
        "given": "",
        "accepted": "",
        "remedy": error.remedy,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        installation.check_packages()
        app(given, prog_name="remitstream")
    except OperatorError as error:
        sys.exit(output.print_error(error, as_json=as_json))
    except Exception as error:  # noqa: BLE001 - the last line before the user; values must not be shown
        sys.exit(output.print_error(output.wrap_unexpected(error), as_json=as_json))


if __name__ == "__main__":
    main()
