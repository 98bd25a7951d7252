"""Commands of the desk: ``dlq``, ``unknown``, ``reviews`` and ``audit``. Parsing, printing and exit codes only."""

from __future__ import annotations

import datetime as dt
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime import command_steps as steps
from runtime import output
from runtime.command_steps import Assignments, Config, Embedded, Json
from schemas.failure import ExitCode

if TYPE_CHECKING:
    from runtime.desk.letters import Choice
    from runtime.desk.office import Office

dlq_app = typer.Typer(help="Dead letters.", no_args_is_help=True)
unknown_app = typer.Typer(help="Writes that may have landed at a target; a person must look.", no_args_is_help=True)
reviews_app = typer.Typer(help="Events that a person must decide about before they go on.", no_args_is_help=True)
audit_app = typer.Typer(help="What people did at the desk.", no_args_is_help=True)

By = Annotated[str, typer.Option("--by", metavar="NAME", help="Your name.")]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="The reason, or a ticket; no patient data.")]
Stage = Annotated[
    str, typer.Option("--stage", "--target", metavar="NAME", help="`normalise`, `release` or a target instance.")
]
Code = Annotated[str, typer.Option("--code", metavar="CODE", help="Reason code.")]
Facility = Annotated[str, typer.Option("--facility", metavar="NAME", help="Facility.")]
Since = Annotated[str | None, typer.Option("--since", metavar="TIME", help="ISO 8601; from then on.")]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="ISO 8601; before then.")]
Everything = Annotated[bool, typer.Option("--all", help="Those that are dealt with, too.")]
Reveal = Annotated[bool, typer.Option("--reveal", help="Show the content, too: an audited act (--by, --why).")]
Letters = Annotated[list[str] | None, typer.Argument(metavar="[ID...]", help="Dead letters, as `dlq list` names them.")]
OneLetter = Annotated[str, typer.Argument(metavar="ID", help="A dead letter, as `dlq list` names it.")]
Proposal = Annotated[int, typer.Argument(metavar="NUMBER", help="Number of the proposal.")]
Event = Annotated[str, typer.Argument(metavar="EVENT", help="Event id.")]
Target = Annotated[str, typer.Option("--target", metavar="NAME", help="Target instance.")]
Review = Annotated[str, typer.Argument(metavar="REVIEW", help="A review, as `reviews list` names it.")]

# ---------------------------------------------------------------- dead letters


@dlq_app.command("list", epilog="Example: remitstream dlq list --target epic-north --code MSA_AR")
def list_letters(
    *,
    stage: Stage = "",
    code: Code = "",
    facility: Facility = "",
    since: Since = None,
    until: Until = None,
    everything: Everything = False,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """List dead letters that need somebody: codes and names, no content."""
    office = _open(config, assignments, embedded=embedded)
    letters = _choose_letters(office, _build_choice((), stage, code, facility, since, until), everything=everything)
    output.print_data([letter.describe() for letter in letters], as_json=as_json)


@dlq_app.command("group", epilog="Example: remitstream dlq group --since 2026-03-01T00:00:00Z")
def group_letters(
    *,
    stage: Stage = "",
    code: Code = "",
    facility: Facility = "",
    since: Since = None,
    until: Until = None,
    everything: Everything = False,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Count dead letters by stage, code and field."""
    office = _open(config, assignments, embedded=embedded)
    letters = _choose_letters(office, _build_choice((), stage, code, facility, since, until), everything=everything)
    output.print_data(steps.load("runtime.desk.letters", "group")(letters), as_json=as_json)


@dlq_app.command("show", epilog="Example: remitstream dlq show 3:1042 --reveal --by ada --why TICKET-7")
def show_letter(
    *,
    identifier: OneLetter,
    reveal: Reveal = False,
    by: By = "",
    why: Why = "",
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Show why one dead letter is here: codes, names of headers and fields."""
    office = _open(config, assignments, embedded=embedded)
    told = steps.load("runtime.desk.dead_letters", "show")(office, identifier, _find_actor(by, why) if reveal else None)
    output.print_data(told, as_json=as_json)


@dlq_app.command("redrive", epilog="Example: remitstream dlq redrive --target epic-north --code MSA_AR --dry-run")
def redrive_letters(
    *,
    letters: Letters = None,
    stage: Stage = "",
    code: Code = "",
    facility: Facility = "",
    since: Since = None,
    until: Until = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would happen.")] = False,
    per_second: Annotated[int, typer.Option("--per-second", min=1, max=10_000, help="At most so many a second.")] = 50,
    again: Annotated[bool, typer.Option("--again", help="Raw records that were dealt with before, too.")] = False,
    by: By = "",
    why: Why = "",
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Send dead letters on their way again, in order, after the cause is mended."""
    actor = None if dry_run else _find_actor(by, why)
    office = _open(config, assignments, embedded=embedded)
    choice = _build_choice(letters or (), stage, code, facility, since, until)
    told = steps.load("runtime.desk.dead_letters", "redrive")(office, choice, actor, per_second=per_second, again=again)
    output.print_data(told, as_json=as_json)


@dlq_app.command("edit", epilog="Example: remitstream dlq edit 3:1042 fixed.json --by ada --why TICKET-7")
def edit_letter(
    *,
    identifier: OneLetter,
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="The edited content.")],
    by: By,
    why: Why,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Propose an edited version; `dlq approve` by a second person sends it on its way."""
    actor = _find_actor(by, why)
    office = _open(config, assignments, embedded=embedded)
    output.print_data(
        steps.load("runtime.desk.dead_letters", "propose_edit")(office, identifier, file, actor), as_json=as_json
    )


@dlq_app.command("waive", epilog="Example: remitstream dlq waive 3:1042 --by ada --why 'paid in cash, TICKET-7'")
def waive_letters(
    *,
    letters: Annotated[list[str], typer.Argument(metavar="ID...", help="Dead letters.")],
    by: By,
    why: Why,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Propose that dead letters end here; `dlq approve` by a second person does it."""
    actor = _find_actor(by, why)
    office = _open(config, assignments, embedded=embedded)
    output.print_data(
        steps.load("runtime.desk.dead_letters", "propose_waiver")(office, letters, actor), as_json=as_json
    )


@dlq_app.command("approve", epilog="Example: remitstream dlq approve 17 --by grace --why 'checked against TICKET-7'")
@reviews_app.command("approve", epilog="Example: remitstream reviews approve 17 --by grace --why 'checked'")
def approve(
    *,
    number: Proposal,
    by: By,
    why: Why,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Release what another person proposed."""
    actor = _find_actor(by, why)
    office = _open(config, assignments, embedded=embedded)
    proposal = office.find_proposal(number, actor)
    module = "runtime.desk.reviews" if proposal.act.startswith("reviews.") else "runtime.desk.dead_letters"
    output.print_data(steps.load(module, "approve")(office, proposal, actor), as_json=as_json)


# ---------------------------------------------------------------- unknown outcomes


@unknown_app.command("list", epilog="Example: remitstream unknown list --target epic-north")
def list_unknown(
    *,
    target: Target = "",
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """List writes whose outcome a person must find out, with the evidence to search by."""
    office = _open(config, assignments, embedded=embedded)
    found = steps.load("runtime.desk.unknown", "list_unknown")(office, (target,) if target else ())
    output.print_data(found, as_json=as_json)


@unknown_app.command("show", epilog="Example: remitstream unknown show EVENT --target epic-north")
def show_unknown(
    *,
    event: Event,
    target: Target,
    reveal: Reveal = False,
    by: By = "",
    why: Why = "",
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Show the evidence of one write: ids, times, outcomes so far."""
    actor = _find_actor(by, why) if reveal else None
    office = _open(config, assignments, embedded=embedded)
    output.print_data(steps.load("runtime.desk.unknown", "show")(office, event, target, actor), as_json=as_json)


@unknown_app.command(
    "decide", epilog="Example: remitstream unknown decide EVENT --target epic-north --posted --by ada --why TICKET-7"
)
def decide_unknown(
    *,
    event: Event,
    target: Target,
    posted: Annotated[bool, typer.Option("--posted/--not-posted", help="Whether the target has it.")],
    by: By,
    why: Why,
    reference: Annotated[str, typer.Option("--reference", metavar="ID", help="The target's own id of it.")] = "",
    wait: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for the deliverer.")] = 15.0,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Say what you found at the target: posted ends it, not posted sends the same bytes again."""
    actor = _find_actor(by, why)
    office = _open(config, assignments, embedded=embedded)
    action = importlib.import_module("schemas.events").Action
    told = steps.load("runtime.desk.unknown", "decide")(
        office,
        event,
        target,
        action.POSTED if posted else action.NOT_POSTED,
        actor,
        reference=reference,
        wait=wait,
    )
    output.print_data(told, as_json=as_json)
    steps.exit_with(_rate_ruling(told["deliverer"]))


# ---------------------------------------------------------------- reviews


@reviews_app.command("list", epilog="Example: remitstream reviews list --reason PATIENT_NOT_NAMED")
def list_reviews(
    *,
    reason: Annotated[str, typer.Option("--reason", metavar="CODE", help="Reason code.")] = "",
    facility: Facility = "",
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """List open reviews and the ways to end each."""
    office = _open(config, assignments, embedded=embedded)
    found = steps.load("runtime.desk.reviews", "read_questions")(office, reason=reason, facility=facility)
    output.print_data([question.describe() for question in found], as_json=as_json)


@reviews_app.command("show", epilog="Example: remitstream reviews show REVIEW")
def show_review(
    *,
    review: Review,
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Show one open review; of a conflicting copy what both copies say about the money."""
    office = _open(config, assignments, embedded=embedded)
    output.print_data(steps.load("runtime.desk.reviews", "show")(office, review), as_json=as_json)


@reviews_app.command(
    "decide", epilog="Example: remitstream reviews decide REVIEW patient --patient NORTH/MR --by ada --why TICKET-7"
)
def decide_review(
    *,
    review: Review,
    way: Annotated[str, typer.Argument(metavar="keep|accept|retry|patient|dismiss", help="As `reviews list` allows.")],
    by: By,
    why: Why,
    patient: Annotated[
        str, typer.Option("--patient", metavar="AUTHORITY/TYPE", help="The value is asked for, or read from input.")
    ] = "",
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """End a review: keep the first copy, try again, name the patient, or propose to accept or dismiss it."""
    actor = _find_actor(by, why)
    office = _open(config, assignments, embedded=embedded)
    if way in ("accept", "dismiss"):
        told = steps.load("runtime.desk.reviews", "propose")(office, [review], way, actor)
    else:
        reference = _read_patient(patient) if way == "patient" else None
        told = steps.load("runtime.desk.reviews", "decide")(office, review, way, actor, patient=reference)
    output.print_data(told, as_json=as_json)


# ---------------------------------------------------------------- audit


@audit_app.command("list", epilog="Example: remitstream audit list --json")
def list_acts(
    *, config: Config = None, assignments: Assignments = None, embedded: Embedded = None, as_json: Json = False
) -> None:
    """List every act: who, when, why, what."""
    acts = _open(config, assignments, embedded=embedded).read_acts()
    write_time = steps.load("runtime.desk.letters", "write_time")
    told = [
        {
            "number": act.number,
            "time": write_time(act.time),
            "by": act.by,
            "os_user": act.os_user,
            "host": act.host,
            "act": act.act,
            "why": act.why,
            "ids": act.ids,
            "facts": act.facts,
        }
        for act in acts
    ]
    output.print_data(told, as_json=as_json)


@audit_app.command("verify", epilog="Example: remitstream audit verify --expect 17:9f86d081...")
def verify_acts(
    *,
    expect: Annotated[
        str, typer.Option("--expect", metavar="NUMBER:HASH", help="An end that was noted down before.")
    ] = "",
    config: Config = None,
    assignments: Assignments = None,
    embedded: Embedded = None,
    as_json: Json = False,
) -> None:
    """Check that no act was changed, removed or added; prints the end, to be kept elsewhere. Exits 1 when broken."""
    office = _open(config, assignments, embedded=embedded)
    number, colon, digest = expect.partition(":")
    if expect and not (colon and number.isdigit()):
        raise typer.BadParameter("give NUMBER:HASH as an earlier `audit verify` printed it", param_hint="--expect")
    chain = steps.load("topics.audit", "verify")(
        office.settings.kafka, office.key, expected=(int(number), digest) if expect else None
    )
    told = {
        "whole": not chain.problems,
        "acts": chain.acts,
        "first": chain.first,
        "end": f"{chain.last}:{chain.head}",
        "problems": chain.problems,
    }
    output.print_data(told, as_json=as_json)
    steps.exit_with(ExitCode.FAILED if chain.problems else ExitCode.OK)


# ---------------------------------------------------------------- shared steps


def _open(config: Path | None, assignments: list[str] | None, *, embedded: bool | None) -> Office:
    office: Office = steps.load("runtime.desk.office", "Office")(
        steps.open_attached(config, assignments, embedded=embedded)
    )
    return office


def _find_actor(by: str, why: str) -> Any:
    return steps.load("runtime.desk.office", "find_actor")(by, why)


def _build_choice(
    ids: list[str] | tuple[str, ...], stage: str, code: str, facility: str, since: str | None, until: str | None
) -> Choice:
    choice: Choice = steps.load("runtime.desk.letters", "Choice")(
        ids=tuple(ids),
        stage=stage,
        code=code,
        facility=facility,
        since=_parse_time(since, "--since"),
        until=_parse_time(until, "--until"),
    )
    return choice


def _choose_letters(office: Office, choice: Choice, *, everything: bool) -> list[Any]:
    book = steps.load("runtime.desk.letters", "LetterBook")(office)
    finished = importlib.import_module("runtime.desk.letters").FINISHED
    return [letter for letter in book.choose(choice) if everything or letter.status not in finished]


def _parse_time(text: str | None, option: str) -> int:
    if text is None:
        return 0
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("give an ISO 8601 time, such as 2026-03-01T00:00:00Z", param_hint=option) from None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=dt.UTC)
    return round(moment.timestamp() * 1000)


def _read_patient(text: str) -> Any:
    """The identifier; its value never stands on a command line, which other users of the host can read."""
    authority, slash, id_type = text.partition("/")
    if not (authority and slash and id_type):
        raise typer.BadParameter("give AUTHORITY/TYPE, for example NORTH/MR", param_hint="--patient")
    value = typer.prompt("Identifier", hide_input=True, err=True).strip()
    return importlib.import_module("schemas.events").Reference(authority, id_type, value)


def _rate_ruling(ruling: str) -> ExitCode:
    if ruling == "taken":
        return ExitCode.OK
    return ExitCode.RETRY if ruling == "waiting" else ExitCode.FAILED
