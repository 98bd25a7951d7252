"""The vault: old or new token at every instant, one writer at a time, nobody else reads it."""

import asyncio
import json
import os
import signal
import stat

import pytest
from pydantic import SecretStr

from clients.vault import StoredToken, Vault, VaultDamaged, VaultExposed, VaultKey, VaultKeyWrong
from schemas.failure import Failure, FailureKind

KEY = VaultKey(SecretStr("k" * 32))
CALLS = ("mkdir", "unlink", "open", "write", "fsync", "close", "replace")


def token(name, **changes):
    values = {
        "access": SecretStr(f"access-{name}"),
        "expires_at": 2000.0,
        "issued_at": 1000.0,
        "refresh": SecretStr(f"refresh-{name}"),
        "seed": "f" * 64,
    }
    return StoredToken(**{**values, **changes})


@pytest.fixture
def vault(tmp_path):
    return Vault(tmp_path / "vault", "north-qbo", KEY)


def test_what_is_written_is_read(vault):
    assert vault.read() is None
    for kept in (token("a"), token("b", refresh=None, seed="")):
        vault.write(kept)
        assert vault.read() == kept
    assert Vault(vault.path.parent, "north-qbo", KEY).read() == kept
    assert Vault(vault.path.parent, "other", KEY).read() is None


def test_only_the_owner_can_read_it(vault):
    old = os.umask(0)
    try:
        vault.write(token("a"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(vault.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(vault.path.parent.stat().st_mode) == 0o700


async def test_an_open_file_or_folder_is_refused(vault):
    vault.write(token("a"))
    vault.path.chmod(0o640)
    with pytest.raises(VaultExposed) as caught:
        vault.read()
    assert "0640" in str(caught.value)
    vault.path.chmod(0o600)
    vault.path.parent.chmod(0o755)
    with pytest.raises(VaultExposed):
        vault.write(token("b"))
    with pytest.raises(VaultExposed):
        async with vault.lock(1.0):
            pass
    vault.path.parent.chmod(0o700)
    assert vault.read() == token("a")


def test_a_link_is_not_followed(vault, tmp_path):
    vault.write(token("a"))
    elsewhere = tmp_path / "elsewhere"
    vault.path.rename(elsewhere)
    vault.path.symlink_to(elsewhere)
    with pytest.raises(VaultExposed):
        vault.read()
    vault.path.unlink()
    (vault.path.parent / "north-qbo.token.new").symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    vault.write(token("b"))
    assert elsewhere.read_bytes() == before
    assert vault.read() == token("b")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 2}', '{"version": 1, "access": 5, "seed": ""}'])
def test_a_damaged_file_is_a_person_s_business_and_stays(vault, text):
    vault.write(token("a"))
    vault.path.write_text(text)
    with pytest.raises(VaultDamaged):
        vault.read()
    assert vault.path.read_text() == text


def test_no_secret_in_errors_or_reprs(vault):
    vault.write(token("a"))
    kept = json.loads(vault.path.read_text())
    vault.path.write_text(json.dumps({**kept, "version": 99}) + "access-a")
    with pytest.raises(VaultDamaged) as caught:
        vault.read()
    shown = f"{caught.value!r} {caught.value} {caught.value.__cause__!r} {token('a')!r}"
    assert "access-a" not in shown
    assert "refresh-a" not in shown


@pytest.mark.parametrize("name", ["", "A", "../x", "a/b", ".hidden", "a" * 64])
def test_a_name_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(ValueError):
        Vault(tmp_path, name, KEY)


def die_before(step, action):
    """Run the action in a child that kills itself before its step-th call of the system. True when it got through."""
    child = os.fork()
    if child == 0:
        count = 0

        def wrap(call):
            def counted(*args, **kwargs):
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counted

        try:
            for name in CALLS:
                setattr(os, name, wrap(getattr(os, name)))
            action()
            os._exit(0)
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def count_outcomes(vault, write):
    """Kill the write at every step; what was there afterwards, in order."""
    seen, step, finished = [], 0, False
    while not finished:
        step += 1
        vault.write(token("old"))
        finished = die_before(step, lambda: write(token("new")))
        kept = vault.read() if vault.path.exists() and vault.path.stat().st_size else None
        seen.append(kept.access.get_secret_value() if kept else None)
    return seen


def test_killed_at_every_step_it_holds_the_old_or_the_new_token(vault):
    seen = count_outcomes(vault, vault.write)
    assert set(seen) == {"access-old", "access-new"}
    assert seen == sorted(seen, reverse=True)  # never back to the old one
    assert len(seen) >= 8
    # What a kill left behind hinders nobody.
    vault.write(token("next"))
    assert vault.read() == token("next")
    assert sorted(path.name for path in vault.path.parent.iterdir()) == ["north-qbo.token"]


def test_the_same_kills_lose_the_token_of_a_plain_write(vault):
    def write_plainly(kept):
        descriptor = os.open(vault.path, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, json.dumps({"version": 1, "access": kept.access.get_secret_value()}).encode())
        os.close(descriptor)

    step, lost, finished = 0, False, False
    while not finished:
        step += 1
        vault.write(token("old"))
        finished = die_before(step, lambda: write_plainly(token("new")))
        lost = lost or not vault.path.stat().st_size
    assert lost


def test_the_content_is_on_disk_before_the_name_is(vault, monkeypatch):
    calls = []

    def note(name, call):
        def noted(*args):
            calls.append(name)
            return call(*args)

        return noted

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, note(name, getattr(os, name)))
    vault.write(token("a"))
    assert calls == ["write", "fsync", "replace", "fsync"]


def test_a_write_that_fails_changes_nothing(vault, monkeypatch):
    vault.write(token("old"))

    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        vault.write(token("new"))
    assert vault.read() == token("old")


def test_short_writes_are_continued(vault, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, rest: write(descriptor, rest[:7]))
    vault.write(token("a"))
    assert vault.read() == token("a")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds
        await asyncio.sleep(0)


async def test_one_holder_at_a_time_and_a_bounded_wait(vault):
    clock, inside = Clock(), []

    async def work(name):
        async with Vault(vault.path.parent, "north-qbo", KEY).lock(1000.0, clock=clock, sleep=clock.sleep):
            inside.append(name)
            for _ in range(5):
                await asyncio.sleep(0)
            assert inside[-1] == name
            inside.append(name)

    await asyncio.gather(*(work(name) for name in "abcde"))
    assert sorted(inside) == sorted("aabbccddee")
    async with vault.lock(1.0):
        with pytest.raises(Failure) as caught:
            async with vault.lock(3.0, clock=clock, sleep=clock.sleep):
                pass
    assert (caught.value.kind, caught.value.code) == (FailureKind.UNAVAILABLE, "TOKEN_LOCKED")
    async with vault.lock(0.0):
        pass


def hold_and_tell(vault, tell):
    async def hold():
        async with vault.lock(5.0):
            os.write(tell, b"x")
            signal.pause()

    child = os.fork()
    if child == 0:
        try:
            asyncio.run(hold())
        finally:
            os._exit(7)
    return child


def test_another_process_keeps_it_and_its_death_frees_it(vault):
    async def take(deadline):
        clock = Clock()
        async with vault.lock(deadline, clock=clock, sleep=clock.sleep):
            return True

    ready, tell = os.pipe()
    child = hold_and_tell(vault, tell)
    try:
        os.read(ready, 1)
        with pytest.raises(Failure):
            asyncio.run(take(1.0))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)
    assert asyncio.run(take(0.0))


def write_plain(vault, kept):
    """What the first version wrote."""
    vault.path.parent.mkdir(mode=0o700, exist_ok=True)
    vault.path.write_text(
        json.dumps(
            {
                "version": 1,
                "access": kept.access.get_secret_value(),
                "expires_at": kept.expires_at,
                "issued_at": kept.issued_at,
                "refresh": kept.refresh.get_secret_value(),
                "seed": kept.seed,
            }
        )
    )
    vault.path.chmod(0o600)


def test_the_file_says_nothing_and_differs_each_time(vault):
    vault.write(token("a"))
    first = vault.path.read_bytes()
    vault.write(token("a"))
    assert vault.path.read_bytes() != first
    for secret in (b"access-a", b"refresh-a", b"f" * 12, b"k" * 12):
        assert secret not in first


async def test_a_plain_file_is_read_and_sealed_under_the_lock(vault):
    write_plain(vault, token("a"))
    assert vault.read() == token("a")
    async with vault.lock(1.0):
        assert b"refresh-a" not in vault.path.read_bytes()
        assert vault.read() == token("a")
    assert stat.S_IMODE(vault.path.stat().st_mode) == 0o600


async def test_another_key_is_named_and_changes_nothing(vault):
    vault.write(token("a"))
    before = vault.path.read_bytes()
    other = Vault(vault.path.parent, "north-qbo", VaultKey(SecretStr("o" * 32)))
    with pytest.raises(VaultKeyWrong, match=r"secrets\.vault_key") as caught:
        other.read()
    assert "kkkk" not in str(caught.value)
    async with other.lock(1.0):
        pass
    assert vault.path.read_bytes() == before
    with pytest.raises(VaultKeyWrong, match="32 characters"):
        VaultKey(SecretStr("k" * 31))


def test_a_changed_or_moved_file_is_not_taken(vault):
    vault.write(token("a"))
    kept = json.loads(vault.path.read_text())
    for place in (0, 20, len(kept["sealed"]) - 6):
        letters = list(kept["sealed"])
        letters[place] = "A" if letters[place] != "A" else "B"
        vault.path.write_text(json.dumps({**kept, "sealed": "".join(letters)}))
        with pytest.raises(VaultDamaged):
            vault.read()
    moved = Vault(vault.path.parent, "other", KEY)
    moved.path.write_text(json.dumps(kept))
    moved.path.chmod(0o600)
    with pytest.raises(VaultDamaged):
        moved.read()
