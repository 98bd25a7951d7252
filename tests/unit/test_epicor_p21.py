"""Settings of the Prophet 21 target beyond what every target keeps (see tests/conformance)."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from sinks.catalog import load

GIVEN = json.loads((Path(__file__).parents[1] / "fixtures/targets/epicor_p21/settings.json").read_text("utf-8"))
TARGET = load("epicor_p21")


@pytest.mark.parametrize("screen", ["credit", "declined"])
@pytest.mark.parametrize(
    "differs",
    [{"table": "other"}, {"reference_column": "other"}, {"number_column": "other"}, {"number_field": "other"}],
)
def test_documents_of_one_place_of_entry_are_found_in_one_table(screen, differs):
    alike = GIVEN["receipt"]
    TARGET.settings.model_validate(GIVEN | {screen: alike})
    # Looked up in the table of the first, a document of the second would be absent, and be posted again.
    with pytest.raises(ValidationError, match=r"CashReceipts TABPAGE_1\.receipt"):
        TARGET.settings.model_validate(GIVEN | {screen: alike | differs})


@pytest.mark.parametrize("part", ["service", "element"])
def test_other_places_of_entry_may_have_other_tables(part):
    other = GIVEN["receipt"] | {part: "other", "table": "other"}
    TARGET.settings.model_validate(GIVEN | {"declined": other})
