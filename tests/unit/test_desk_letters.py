"""Which dead letters a filter of the desk means, and how the command line says it."""

import pytest

from runtime import cli, desk_commands
from runtime.desk.letters import Choice, Letter
from topics.reading import Record

NINE, TEN, ELEVEN = (1_772_355_600_000 + hour * 3_600_000 for hour in range(3))


def build(offset, stage, code, facility, time):
    named = {"dead_letter_stage": stage, "dead_letter_code": code, "facility": facility, "dead_letter_time": str(time)}
    return Letter(Record("dlq", 0, offset, b"k", b"{}", [(name, text.encode()) for name, text in named.items()], 0))


LETTERS = [
    build(0, "normalise", "BODY_INVALID", "north", NINE),
    build(1, "epic-north", "MSA_AR", "north", TEN),
    build(2, "epic-valley", "MSA_AR", "valley", TEN),
    build(3, "epic-valley", "MSA_AE", "valley", ELEVEN),
]


@pytest.mark.parametrize(
    ("choice", "offsets"),
    [
        (Choice(), [0, 1, 2, 3]),
        (Choice(stage="epic-valley"), [2, 3]),
        (Choice(code="MSA_AR"), [1, 2]),
        (Choice(facility="north"), [0, 1]),
        (Choice(since=TEN), [1, 2, 3]),
        (Choice(until=TEN), [0]),
        (Choice(since=TEN, until=ELEVEN), [1, 2]),
        (Choice(code="MSA_AR", facility="valley", since=TEN), [2]),
        (Choice(ids=("0:3", "0:0")), [0, 3]),
        (Choice(ids=("0:3",), facility="north"), []),
    ],
)
def test_every_filter_narrows(choice, offsets):
    assert [letter.record.offset for letter in LETTERS if choice.takes(letter)] == offsets


@pytest.mark.parametrize("command", ["list", "group", "redrive"])
def test_the_options_say_the_same(monkeypatch, command):
    chosen = []
    monkeypatch.setattr(desk_commands, "_open", lambda *_, **__: None)
    monkeypatch.setattr(desk_commands, "_choose_letters", lambda _office, choice, **_: chosen.append(choice) or [])
    real = desk_commands.steps.load

    def load(module, name):
        if name == "redrive":
            return lambda _office, choice, *_, **__: chosen.append(choice) or {}
        return real(module, name)

    monkeypatch.setattr(desk_commands.steps, "load", load)
    more = ["--dry-run"] if command == "redrive" else []
    options = ["--target", "epic-valley", "--code", "MSA_AR", "--facility", "valley"]
    times = ["--since", "2026-03-01T10:00:00+00:00", "--until", "2026-03-01T11:00:00"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["dlq", command, *more, *options, *times, "--json"])
    assert caught.value.code == 0
    assert chosen == [Choice(stage="epic-valley", code="MSA_AR", facility="valley", since=TEN, until=ELEVEN)]
