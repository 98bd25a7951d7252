"""What is told of an exception nobody foresaw."""

import errno

import pytest

from runtime.output import wrap_unexpected


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_refused_folder_is_named(number):
    told = wrap_unexpected(OSError(number, "x", "/srv/remitstream/.remitstream"))
    assert (told.code, told.place) == ("RS397", "/srv/remitstream/.remitstream")
    assert "writable" in told.remedy


@pytest.mark.parametrize(
    "error", [OSError("a text that may be private"), OSError(errno.EPIPE, "x"), ValueError("private")]
)
def test_the_text_of_any_other_is_not_told(error):
    told = wrap_unexpected(error)
    assert told.code == "RS390"
    assert "private" not in f"{told} {told.place}"
