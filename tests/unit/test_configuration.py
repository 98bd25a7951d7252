import tomllib

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from runtime.configuration import Document, MissingFileError, SyntaxIssueError, find_lines, read_document

KEYS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8)
TEXTS = st.text(st.sampled_from("ab\"'\\#=[]{},. \n\té"), max_size=12)
SCALARS = st.one_of(st.integers(-(2**40), 2**40), st.booleans(), st.floats(allow_nan=False), TEXTS, st.datetimes())
VALUES = st.recursive(
    SCALARS,
    lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(KEYS, below, max_size=3)),
    max_leaves=12,
)


def list_keys(node, key=()):
    """Every path of a parsed document, by walking its values."""
    if isinstance(node, dict):
        members = node.items()
    elif isinstance(node, list):
        members = enumerate(node)
    else:
        return
    for part, below in members:
        yield (*key, part)
        yield from list_keys(below, (*key, part))


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
def test_every_key_of_any_document_has_a_line(tree, multiline):
    text = tomli_w.dumps(tree, multiline_strings=multiline)
    found = find_lines(text.replace("\r\n", "\n"))
    assert set(found) == set(list_keys(tomllib.loads(text)))
    count = text.count("\n") + 1
    assert all(1 <= line <= count for line in found.values())


WRITTEN = '''\
# "quoted" [not] a = table
title = "a # b"          # comment = 1
[ owner . "full name" ]
'first' = 'C:\\'
dotted.inner."last key" = { x = 1, y = [ 1,
   2, # two ]
   """three
   ]""", ] }

[[ items ]]
name = """\\
   one = \\""" two """""
[[items.parts]]
n = 1
[[items.parts]]
n = 2
[items.settings]
s = '''

WRITTEN += "'''\nraw ''' \n[[items]]\nwhen = 1979-05-27T07:32:00Z\n"

LINES = {
    ("title",): 2,
    ("owner",): 3,
    ("owner", "full name"): 3,
    ("owner", "full name", "first"): 4,
    ("owner", "full name", "dotted"): 5,
    ("owner", "full name", "dotted", "inner"): 5,
    ("owner", "full name", "dotted", "inner", "last key"): 5,
    ("owner", "full name", "dotted", "inner", "last key", "x"): 5,
    ("owner", "full name", "dotted", "inner", "last key", "y"): 5,
    ("owner", "full name", "dotted", "inner", "last key", "y", 0): 5,
    ("owner", "full name", "dotted", "inner", "last key", "y", 1): 6,
    ("owner", "full name", "dotted", "inner", "last key", "y", 2): 7,
    ("items",): 10,
    ("items", 0): 10,
    ("items", 0, "name"): 11,
    ("items", 0, "parts"): 13,
    ("items", 0, "parts", 0): 13,
    ("items", 0, "parts", 0, "n"): 14,
    ("items", 0, "parts", 1): 15,
    ("items", 0, "parts", 1, "n"): 16,
    ("items", 0, "settings"): 17,
    ("items", 0, "settings", "s"): 18,
    ("items", 1): 20,
    ("items", 1, "when"): 21,
}


def test_lines_of_a_document_with_every_form():
    tomllib.loads(WRITTEN)
    assert find_lines(WRITTEN) == LINES


def test_a_missing_key_is_placed_at_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text("a = 1\n[b]\nc = 2\n")
    document = read_document(tmp_path / "r.toml")
    assert document.locate(("b", "absent", "x")) == "r.toml:2"
    assert document.locate(("b", "c")) == "r.toml:3"
    assert document.locate(("nowhere",)) == "r.toml"
    assert isinstance(document, Document)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"a = 1\nb = unquoted-secret\n", 2),
        (b"a = 1\n\na = 'twice'\n", 3),
        (b"[a\n", 1),
        (b'a = "open', 1),
    ],
)
def test_text_that_is_not_toml_names_the_line_and_no_value(tmp_path, content, line):
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(SyntaxIssueError) as caught:
        read_document(path)
    assert caught.value.place.endswith(f"r.toml:{line}")
    assert "unquoted" not in str(caught.value)
    assert "twice" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(SyntaxIssueError):
        read_document(tmp_path / "r.toml")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingFileError) as caught:
        read_document(tmp_path / "absent.toml")
    assert caught.value.place == str(tmp_path / "absent.toml")
    assert "init" in caught.value.remedy
    assert caught.value.exit_code == 78


def test_windows_line_ends_count_once(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"a = 1\r\n[b]\r\nc = 2\r\n")
    assert read_document(tmp_path / "r.toml").lines[("b", "c")] == 3
