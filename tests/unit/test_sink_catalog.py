"""The catalog of targets finds every file and speaks up about a broken one."""

import pytest

from sinks.catalog import TargetBroken, TargetUnknown, discover, load

GOOD = """
from sinks.contract import Answer, Request, Target, TargetClass, TargetSettings

TARGET = Target(
    name={name!r}, display_name="X", status="sandbox", documentation="https://example.org", transport="mllp",
    settings=TargetSettings, classify=lambda s: TargetClass.D, routes=lambda e, s: True,
    freeze=lambda e, c, s: Request(b"x", "c", "r"), verdict=lambda a, r, s: Answer(None, "OK"), capabilities={{}},
)
"""


def test_shipped_targets_are_found():
    assert discover()["epic_dft"] is load("epic_dft")


def test_a_file_in_the_users_folder_is_a_target(tmp_path):
    (tmp_path / "acme_billing.py").write_text(GOOD.format(name="acme_billing"))
    assert set(discover(tmp_path)) == {*discover(), "acme_billing"}
    assert load("acme_billing", tmp_path).display_name == "X"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("import no_such_module", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("", "declares no TARGET"),
        ("TARGET = 1", "declares no TARGET"),
        (GOOD.format(name="other"), "named 'other'"),
        (GOOD.format(name="acme").replace("settings=TargetSettings", "settings=dict"), "no TargetSettings"),
    ],
)
def test_a_broken_file_stops_the_start_with_its_path(tmp_path, content, complaint):
    (tmp_path / "acme.py").write_text(content)
    with pytest.raises(TargetBroken, match=complaint) as caught:
        discover(tmp_path)
    assert caught.value.place == str(tmp_path / "acme.py")


def test_a_name_may_not_exist_twice(tmp_path):
    (tmp_path / "epic_dft.py").write_text(GOOD.format(name="epic_dft"))
    with pytest.raises(TargetBroken, match="already"):
        discover(tmp_path)


def test_a_missing_folder_and_an_unknown_name_are_named(tmp_path):
    with pytest.raises(TargetBroken):
        discover(tmp_path / "none")
    with pytest.raises(TargetUnknown) as caught:
        load("nobody")
    assert "epic_dft" in caught.value.remedy
