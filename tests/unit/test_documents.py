"""Documents that people write by hand, held against what the code says."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from runtime.account import FATES, OUTCOMES, Account, Balance
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
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text("utf-8")):
        if not target.startswith(("https://", "http://")):
            assert (document.parent / target).exists(), target


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
