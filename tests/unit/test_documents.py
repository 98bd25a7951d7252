"""Documents that people write by hand, held against what the code says."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import typer

from runtime.account import FATES, OUTCOMES, Account, Balance
from runtime.cli import app
from runtime.settings import Settings
from sandbox.traffic import Summary
from topics.catalog import DAY_MS, HL7, list_topics

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})


def read_section(document, title):
    text = (ROOT / document).read_text("utf-8")
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def read_rows(section):
    """First cell's names -> the whole row."""
    rows = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            rows |= dict.fromkeys(re.findall(r"`([^`]+)`", line.split("|")[1]), line)
    return rows


@pytest.mark.invariant("I7")
def test_every_topic_is_listed_with_or_without_patient_data():
    with_phi = read_rows(read_section("docs/phi.md", "Topics that hold patient data"))
    without = read_rows(read_section("docs/phi.md", "Topics without patient data"))
    topics = list_topics(["SOURCE", HL7], ["TARGET"])
    assert set(with_phi) == {topic.name for topic in topics if topic.phi}
    assert set(without) == {topic.name for topic in topics if not topic.phi}
    for topic in topics:
        row = (with_phi | without)[topic.name]
        kept = "latest per key" if topic.cleanup == "compact" else f"{topic.retention_ms // DAY_MS} days"
        assert kept in row, topic.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", document.read_text("utf-8")):
        if not target.startswith(("https://", "http://")):
            path = document.parent / target if target else document
            assert path.exists(), target
            assert not anchor or anchor in list_anchors(path), f"{target}#{anchor}"


def list_anchors(document):
    """Names of the headings, as they are linked to."""
    titles = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_named_tests_exist(document):
    for file, names in re.findall(r"`(?:tests/)?(\w+/test_\w+\.py)((?:::\w+)*)`", document.read_text("utf-8")):
        text = (ROOT / "tests" / file).read_text("utf-8")
        for name in names.split("::")[1:]:
            assert re.search(rf"^\s*(?:async def|def|class) {name}\b", text, re.MULTILINE), f"{file}::{name}"


def list_commands(text):
    """Command lines of ours: those in blocks, and those within a sentence, which may be cut short."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [
        line
        for block in blocks
        for line in re.findall(r"^(?:\$ )?(?:\.venv/bin/)?remitstream (.*)", block, re.MULTILINE)
    ]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return lines, re.findall(r"`(?:\.venv/bin/)?remitstream ([^`]+)`", prose)


def find_command(words):
    """The command of these words, its context, and what of the words is left for it."""
    found = typer.main.get_command(app)
    context = found.make_context("remitstream", [], resilient_parsing=True)
    while words and isinstance(found, typer.core.TyperGroup):
        found = found.get_command(context, words[0])
        assert found is not None, f"no command {words[0]}"
        words = words[1:]
    return found, words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_are_understood(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fixed.json").write_text("{}", "utf-8")
    lines, mentions = list_commands(document.read_text("utf-8"))
    for line in lines:
        words = shlex.split(line.partition(" > ")[0], comments=True)
        command, rest = find_command(words)
        # Parses every argument and option, runs nothing.
        command.make_context(words[0], rest)
    for mention in mentions:
        command, rest = find_command(mention.split())
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known, mention


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_named_settings_exist(document):
    """Every ``section.name`` in code marks, and every variable of ours, is a setting."""
    text = document.read_text("utf-8")
    sections = {name: field.annotation for name, field in Settings.model_fields.items()}
    for section, name in re.findall(r"`([a-z_]+)\.([a-z_]+)(?: = [^`]*)?`", text):
        model = sections.get(section)
        if section in sections and isinstance(model, type) and hasattr(model, "model_fields"):
            assert name in model.model_fields, f"{section}.{name}"
    for section, name in re.findall(r"REMITSTREAM_([A-Z]+)__([A-Z]+(?:_[A-Z]+)*)(?![A-Z_])", text):
        model = sections[section.lower()]
        if isinstance(model, type) and hasattr(model, "model_fields"):
            assert name.lower() in model.model_fields, f"{section}__{name}"


def list_report_fields():
    """Keys of the report: those of the account itself, and those that stand in the code that completes it."""
    (function,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "runtime" / "run.py").read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == "_build_report"
    )
    (returned,) = (node.value for node in ast.walk(function) if isinstance(node, ast.Return))
    written = {key.value for key in returned.keys if isinstance(key, ast.Constant)}
    balance = Balance(0, dict.fromkeys(FATES, 0))
    return written | set(Account(balance, {}, {}, {}).build_report()) | set(OUTCOMES)


def test_every_field_of_the_report_is_described_and_no_other():
    described = set(read_rows((ROOT / "docs" / "report.md").read_text("utf-8")))
    assert described == list_report_fields()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Summary)])
def test_what_the_generator_did_is_described(name):
    assert f"`{name}`" in read_rows((ROOT / "docs" / "report.md").read_text("utf-8"))["sent"]


def test_the_equations_are_written_with_the_names_of_the_code():
    text = (ROOT / "docs" / "report.md").read_text("utf-8")
    assert " + ".join(FATES) in text
    assert " + ".join(OUTCOMES) in text
