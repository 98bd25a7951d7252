"""What must hold for the tree as a whole: names, sizes, and nothing of one machine in it."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from runtime.installation import PACKAGES

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager", "core", "ops"}
LONGEST = 800
"""Lines of a module; one beyond 400 is looked at whether it is two things."""


def list_tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git work tree")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})


def name_path(path):
    return path.relative_to(ROOT).as_posix()


def find_in_tracked(pattern, *, outside=()):
    """``file:line`` of every match in a tracked text file."""
    found = []
    for path in list_tracked():
        if name_path(path).startswith(tuple(outside)):
            continue
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{name_path(path)}:{number}" for number, line in enumerate(lines, 1) if re.search(pattern, line)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_path)
def test_a_module_is_named_for_what_is_in_it(path):
    names = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    assert not names & FORBIDDEN


@pytest.mark.parametrize("path", MODULES, ids=name_path)
def test_a_module_is_one_thing(path):
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is_and_is_not(package):
    text = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text("utf-8"))) or ""
    assert re.search(r"\b(is not|are not)\b", text)
    assert len(text.splitlines()[0]) > len(package)


@pytest.mark.parametrize("folder", FOLDERS, ids=name_path)
def test_a_folder_of_modules_is_a_described_package(folder):
    init = folder / "__init__.py"
    assert init.is_file()
    assert ast.get_docstring(ast.parse(init.read_text("utf-8")))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_typed_and_shipped(package):
    assert (ROOT / package / "py.typed").is_file()
    assert f'"{package}*"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_no_private_name_is_imported_from_another_package():
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
                own = name_path(path).split("/")[0] == node.module.split(".")[0]
                found += [f"{name_path(path)}: {n.name}" for n in node.names if n.name.startswith("_") and not own]
    assert not found


def test_nothing_is_left_to_do():
    assert not find_in_tracked(r"\b(TO[D]O|FI[X]ME)\b", outside=("tests/fixtures/",))


def test_no_address_of_a_package_registry():
    # Users are behind mirrors of their own: pip's and Maven's configuration say where packages come from.
    hosts = r"py[p]i\.org|python[h]osted\.org|repo1?\.mave[n]\.|npm[j]s\.(org|com)|mave[n]\.org"
    assert not find_in_tracked(hosts)


def test_no_path_of_one_machine():
    assert not find_in_tracked(r"(^|[\s\"'(=:])/(work|root|home|Users)/", outside=("tests/fixtures/",))
    assert not find_in_tracked(r"[\"'(= ]/tmp/", outside=("tests/", ".ci/"))


def test_those_searches_find_what_they_look_for():
    assert find_in_tracked(r"tests/invariants\.toml")
    assert find_in_tracked(r"^import re$", outside=("tests/unit/test_repository",))


def test_the_licence_is_the_whole_of_apache_2():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "Makefile", "requirements.lock", ".ci/run"]
)
def test_what_people_look_for_is_there(name):
    assert (ROOT / name).stat().st_size > 0


def test_every_locked_package_has_a_hash_and_none_an_address():
    text = (ROOT / "requirements.lock").read_text("utf-8")
    blocks = re.split(r"\n(?=\S)", text.strip())
    assert len(blocks) > 50
    assert not [block.split()[0] for block in blocks if "==" not in block or "--hash=sha256:" not in block]
    assert "://" not in text


def test_every_decision_is_in_the_index():
    index = (ROOT / "docs" / "decisions" / "README.md").read_text("utf-8")
    pages = [path.name for path in (ROOT / "docs" / "decisions").glob("[0-9]*.md")]
    assert pages
    assert not [page for page in pages if f"({page})" not in index]


def test_commit_hooks_run_what_is_installed_here():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    (repository,) = hooks["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert {"ruff-format", "ruff", "mypy", "lint-imports", "tables"} == {hook["id"] for hook in repository["hooks"]}


def test_the_ci_script_is_plain_and_runs_everything():
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).returncode == 0
    text = path.read_text("utf-8")
    for step in ("make test", "make check", "-m build", "run --once"):
        assert step in text
    check = (ROOT / "Makefile").read_text("utf-8").split("\ncheck:")[1].split("\n\n")[0]
    for step in ("ruff format --check", "ruff check", "mypy", "lint-imports", "tables --check"):
        assert step in check
