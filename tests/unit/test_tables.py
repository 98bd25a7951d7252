import re
from pathlib import Path

import pytest

from runtime import settings_reference, tables
from runtime.settings import Settings
from schemas.failure import ConfigurationError, ExitCode, FatalError, TemporaryError

ROOT = Path(__file__).resolve().parents[2]


def test_every_error_has_its_own_code_in_the_family_of_its_exit_code():
    errors = tables.list_errors()
    assert len(errors) > 20
    families = {"1": (ConfigurationError, ExitCode.CONFIGURATION), "2": (TemporaryError, ExitCode.RETRY),
                "3": (FatalError, ExitCode.FAILED)}  # fmt: skip
    exit_codes = dict(families.values())
    for error in errors:
        assert re.fullmatch(r"RS[1234]\d\d", error.code), error
        assert "code" in vars(error), f"{error} has no code of its own"
        # RS4xx is delivery and desk, whatever the family.
        found = [family for family in exit_codes if issubclass(error, family)]
        assert len(found) == 1, error
        family, exit_code = families.get(error.code[2], (found[0], exit_codes[found[0]]))
        assert issubclass(error, family), error
        assert error.exit_code == exit_code, error
        assert error.meaning.endswith("."), error
        assert error.default_remedy.endswith("."), error


def test_two_errors_of_one_code_are_refused():
    first = type("FirstPlanted", (FatalError,), {"code": "RS998", "__module__": "runtime.planted"})
    second = type("SecondPlanted", (FatalError,), {"code": "RS998", "__module__": "runtime.planted"})
    try:
        with pytest.raises(tables.RepeatedCodeError) as caught:
            tables.list_errors()
        assert "RS998" in caught.value.detail
    finally:
        # Subclass lists hold weak references to live classes: these two must not meet other tests.
        first.__module__ = second.__module__ = "tests.planted"


def test_the_codes_that_the_source_names_are_all_in_the_document():
    """Found by text, not by import: an error class nobody imports would be missing from the document."""
    written = set()
    for package in tables.PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            written |= set(re.findall(r'^\s+code = "(RS\d+)"', path.read_text(), re.MULTILINE))
    listed = set(re.findall(r"^\| `(RS\d+)` \|", tables.render_errors(tables.list_errors()), re.MULTILINE))
    assert listed == written


def test_the_committed_documents_are_up_to_date():
    assert tables.check(ROOT) == []


def test_stale_and_missing_documents_are_refused_and_mended(tmp_path):
    with pytest.raises(tables.StaleTablesError):
        tables.check(tmp_path)
    assert set(tables.write(tmp_path)) == set(tables.render())
    assert tables.check(tmp_path) == []
    errors = tmp_path / "docs" / "errors.md"
    errors.write_text(errors.read_text() + "x")
    with pytest.raises(tables.StaleTablesError) as caught:
        tables.check(tmp_path)
    assert "docs/errors.md" in caught.value.detail
    assert "topics.md" not in caught.value.detail
    assert tables.write(tmp_path) == ["docs/errors.md"]


def test_every_setting_is_in_the_reference_with_its_variable():
    text = settings_reference.render_configuration()
    for name, field in Settings.model_fields.items():
        members = getattr(field.annotation, "model_fields", None)
        if members is None:
            assert f"[[{name}]]" in text or f"`REMITSTREAM_{name.upper()}`" in text
            continue
        for member in members:
            assert f"`REMITSTREAM_{name.upper()}__{member.upper()}`" in text or f"[{name}.{member}]" in text
    assert "| `port` | integer, at least 0, at most 65535 | `8480` | `REMITSTREAM_RECEIVER__PORT` |" in text
    assert "| `hmac_key` | secret | required | `REMITSTREAM_SECRETS__HMAC_KEY` |" in text


def test_every_setting_is_explained():
    text = settings_reference.render_configuration()
    unexplained = re.findall(r"^\| `(\w+)` \|.*\|  \|$", text, re.MULTILINE)
    assert unexplained == []


def test_every_setting_of_ours_has_an_effect():
    """A setting that nobody reads is a promise nobody keeps."""
    text = "\n".join(path.read_text() for package in tables.PACKAGES for path in (ROOT / package).rglob("*.py"))
    unread = [
        f"{section}.{name}"
        for section, field in Settings.model_fields.items()
        if getattr(field.annotation, "__module__", "") == "runtime.sections"
        for name in field.annotation.model_fields
        if not re.search(rf"\.{section}\.{name}\b", text)
    ]
    assert unread == []


def test_known_cells_of_the_topic_table():
    text = tables.render_topics()
    [payments] = [line for line in text.splitlines() if line.startswith("| `payments` |")]
    assert "`money_event`" in payments
    assert "| yes |" in payments
    [frontiers] = [line for line in text.splitlines() if line.startswith("| `frontiers` |")]
    assert "| latest per key |" in frontiers
    assert "| `attempts.TARGET` |" in text


def test_known_cells_of_the_connector_table():
    text = tables.render_connectors()
    [stripe] = [line for line in text.splitlines() if line.startswith("| `stripe` |")]
    assert "| Stripe | sandbox | `raw.stripe` |" in stripe
