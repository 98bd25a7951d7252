"""Every invariant has tests, every name in the table is a test, and the table says what the last run counted."""

import ast
import json
import re
from pathlib import Path

import pytest

from tests import invariants

ROOT = Path(__file__).parents[2]
COUNTS = ROOT / "docs" / "generated" / "invariants.json"
KNOWN = invariants.read()


def list_tests():
    """Node ids of all tests, read from the sources: not from what this run happened to collect."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT).as_posix()
        for node in ast.parse(path.read_text("utf-8")).body:
            inside = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{file}::{node.name}::" if isinstance(node, ast.ClassDef) else f"{file}::"
            found += [
                prefix + test.name
                for test in inside
                if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef) and test.name.startswith("test_")
            ]
    return found


TESTS = list_tests()


def test_there_are_ten_and_each_is_explained():
    assert list(KNOWN) == [f"I{number}" for number in range(1, 11)]
    assert all(set(entry) == {"name", "says", "tests"} for entry in KNOWN.values())


@pytest.mark.parametrize(
    ("name", "pattern"), [(name, test) for name, entry in KNOWN.items() for test in entry["tests"]]
)
def test_every_name_means_a_test(name, pattern):
    assert [test for test in TESTS if invariants.match(pattern, test)]


def test_a_name_that_means_no_test_is_seen():
    assert not [test for test in TESTS if invariants.match("tests/unit/test_money.py::test_gone", test)]
    assert not [test for test in TESTS if invariants.match("tests/unit/test_mon.py", test)]


def test_the_running_test_carries_its_marks(request):
    assert [marker.args for marker in request.node.iter_markers("invariant")] == []
    assert invariants.find(KNOWN, "tests/unit/test_money.py::test_anything[USD]") == ["I8"]


def test_the_last_run_counted_every_invariant_in_files_that_exist():
    counts = json.loads(COUNTS.read_text("utf-8"))
    assert list(counts) == list(KNOWN)
    for name, entry in counts.items():
        assert entry["passed"] == sum(entry["tests"].values()) > 0, name
        assert not [file for file in entry["tests"] if not (ROOT / file).is_file()], name


def test_the_table_is_made_from_the_counts():
    text = COUNTS.with_suffix(".md").read_text("utf-8")
    assert text == invariants.render(json.loads(COUNTS.read_text("utf-8")))
    assert re.findall(r"^\| \*\*(I\d+)\*\*", text, re.MULTILINE) == list(KNOWN)


def test_the_readme_shows_the_same_counts():
    text = invariants.README.read_text("utf-8")
    assert text == invariants.put_summary(text, json.loads(COUNTS.read_text("utf-8")))


def test_a_tally_counts_what_passed(tmp_path):
    tally = invariants.Tally()
    tally.add("tests/unit/test_money.py", ["I8", "I9"])
    tally.add("tests/unit/test_money.py", ["I8"])
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- invariants -->\nold\n<!-- end -->\nafter\n", "utf-8")
    tally.write(tmp_path / "counts.json", readme)
    counts = json.loads((tmp_path / "counts.json").read_text("utf-8"))
    assert counts["I8"] == {"passed": 2, "tests": {"tests/unit/test_money.py": 2}}
    assert counts["I9"]["passed"] == 1
    assert counts["I1"]["passed"] == 0
    lines = readme.read_text("utf-8").splitlines()
    assert "| **I8** Money is exact | `unit/test_money.py` | 2 |" in lines
    assert [lines[0], lines[-1]] == ["before", "after"]
    assert "old" not in lines
    assert "`unit/test_money.py` 2" in (tmp_path / "counts.md").read_text("utf-8")
