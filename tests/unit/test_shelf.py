"""Bytes on disk, by place."""

import gc
import os

import pytest

from sinks.shelf import Shelf


def test_what_was_put_is_found_at_its_place_byte_by_byte():
    shelf = Shelf()
    given = [b"", b"x", os.urandom(100_000), b"\x00\xff"]
    places = [shelf.put(data) for data in given]
    assert len(set(places)) == len(given)
    for data, place in reversed(list(zip(given, places, strict=True))):
        assert shelf.get(place) == data


def test_a_place_where_nothing_is_raises():
    shelf = Shelf()
    place = shelf.put(b"abc")
    with pytest.raises(OSError, match="are left"):
        shelf.get(place + 1)


def test_nothing_is_left_open_when_it_goes():
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None  # noqa: PTH112, PTH208
    if open_before is None:
        pytest.skip("this system does not list its open files")
    shelf = Shelf()
    shelf.put(b"abc")
    assert len(os.listdir("/proc/self/fd")) == open_before + 1  # noqa: PTH208
    del shelf
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == open_before  # noqa: PTH208
