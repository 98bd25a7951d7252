"""What no single setting can say: names that must exist elsewhere, be unique, or stand together.

The checks read the merged tree and not the models, so that they run also when some settings are wrong, and everything
is named at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from runtime.configuration import Issue, Key, show_path
from runtime.layers import Merged, suggest
from runtime.validation import hide_credentials
from schemas.mapping import check_files


@dataclass(frozen=True, slots=True)
class Known:
    """Connectors that exist."""

    gateways: frozenset[str]
    connectors: frozenset[str]
    renewing: frozenset[str] = frozenset()
    """Target connectors that keep a refresh token."""


def run_checks(merged: Merged, known: Known) -> list[Issue]:
    """All issues between settings."""
    checks: tuple[Callable[[Merged, Known], Iterator[Issue]], ...] = (
        _check_unique_names,
        _check_feed_senders,
        _check_references,
        _check_vault,
        _check_authorities,
        _check_aliases,
        _check_ports,
        _check_files,
        _check_overlays,
        _check_urls,
    )
    return [issue for check in checks for issue in check(merged, known)]


def _list(tree: Any, section: str) -> list[tuple[int, dict[str, Any]]]:
    """Tables of a list, with their positions."""
    elements = tree.get(section) if isinstance(tree, dict) else None
    return (
        [(at, node) for at, node in enumerate(elements) if isinstance(node, dict)] if isinstance(elements, list) else []
    )


def _issue(merged: Merged, key: Key, problem: str, *, given: str = "", accepted: str = "", remedy: str = "") -> Issue:
    return Issue(
        key=merged.spell(key),
        place=merged.say_place(key),
        problem=problem,
        given=given,
        accepted=accepted,
        remedy=remedy,
    )


def _find_repeats(values: Iterable[tuple[Key, Any]]) -> Iterator[tuple[Key, Key]]:
    """Pairs (later, first) of keys whose values are equal."""
    seen: dict[Any, Key] = {}
    for key, value in values:
        if value in seen:
            yield key, seen[value]
        else:
            seen[value] = key


def _check_unique_names(merged: Merged, _known: Known) -> Iterator[Issue]:
    members = {"facilities": ("id",), "accounts": ("source", "name"), "feeds": ("name",), "targets": ("name",)}
    for section, parts in members.items():
        values = [
            ((section, at, parts[-1]), tuple(node[part] for part in parts))
            for at, node in _list(merged.tree, section)
            if all(isinstance(node.get(part), str) for part in parts)
        ]
        for key, first in _find_repeats(values):
            yield _issue(
                merged,
                key,
                f"used twice; first at {merged.say_place(first)}.",
                given=repr(merged.tree[section][key[1]][parts[-1]]),
                remedy="Give each its own name.",
            )


def _check_feed_senders(merged: Merged, _known: Known) -> Iterator[Issue]:
    values = [
        (("feeds", at), (node["sending_application"], node["sending_facility"]))
        for at, node in _list(merged.tree, "feeds")
        if isinstance(node.get("sending_application"), str) and isinstance(node.get("sending_facility"), str)
    ]
    for key, first in _find_repeats(values):
        yield _issue(
            merged,
            key,
            f"same MSH-3 and MSH-4 as the feed at {merged.say_place(first)}.",
            remedy="A sender belongs to one feed: correct the sender, or remove one of them.",
        )


def _check_references(merged: Merged, known: Known) -> Iterator[Issue]:
    facilities = {node["id"] for _, node in _list(merged.tree, "facilities") if isinstance(node.get("id"), str)}
    for section in ("accounts", "feeds"):
        for at, node in _list(merged.tree, section):
            yield from _check_member(merged, (section, at, "facility"), node.get("facility"), facilities, "facility")
    for at, node in _list(merged.tree, "accounts"):
        yield from _check_member(merged, ("accounts", at, "source"), node.get("source"), known.gateways, "gateway")
    for at, node in _list(merged.tree, "targets"):
        key: Key = ("targets", at, "connector")
        yield from _check_member(merged, key, node.get("connector"), known.connectors, "target connector")
        names = node.get("facilities")
        for position, name in enumerate(names if isinstance(names, list) else []):
            yield from _check_member(merged, ("targets", at, "facilities", position), name, facilities, "facility")


def _check_vault(merged: Merged, known: Known) -> Iterator[Issue]:
    """A deliverer with a refresh token and nothing to seal it with would not start."""
    secrets = merged.tree.get("secrets")
    if isinstance(secrets, dict) and secrets.get("vault_key") is not None:
        return
    users = [
        merged.spell(("targets", at))
        for at, node in _list(merged.tree, "targets")
        if node.get("connector") in known.renewing
    ]
    if users:
        yield _issue(
            merged,
            ("secrets", "vault_key"),
            f"missing: it seals the refresh tokens of {', '.join(users)}.",
            accepted="a reference to a secret of at least 32 characters",
            remedy='Make one with `openssl rand -hex 32`, keep it, and set `vault_key = "env:NAME"` or `"file:/path"`.',
        )


def _check_member(merged: Merged, key: Key, given: Any, accepted: Iterable[str], what: str) -> Iterator[Issue]:
    choices = sorted(accepted)
    if isinstance(given, str) and given not in choices:
        yield _issue(
            merged,
            key,
            f"no such {what}.",
            given=repr(given),
            accepted=", ".join(choices) or "none defined",
            remedy=suggest(given, choices) or f"Name one of the accepted ones, or define the {what}.",
        )


def _list_spellings(facility: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    """Every spelling of every authority of a facility: key below the facility, canonical name, spelling."""
    for at, authority in _list(facility, "authorities"):
        name = authority.get("name")
        if not isinstance(name, str):
            continue
        yield ("authorities", at, "name"), name, name
        aliases = authority.get("aliases")
        for position, alias in enumerate(aliases if isinstance(aliases, list) else []):
            if isinstance(alias, str):
                yield ("authorities", at, "aliases", position), name, alias


def _check_authorities(merged: Merged, _known: Known) -> Iterator[Issue]:
    for at, facility in _list(merged.tree, "facilities"):
        names = [str(node["name"]) for _, node in _list(facility, "authorities") if isinstance(node.get("name"), str)]
        key: Key = ("facilities", at, "default_authority")
        given = facility.get("default_authority")
        yield from _check_member(merged, key, given, names, "assigning authority of this facility")


def _check_aliases(merged: Merged, _known: Known) -> Iterator[Issue]:
    """One spelling may not mean two authorities: neither inside a facility nor over all of them."""
    meanings: dict[str, tuple[str, Key]] = {}
    for at, facility in _list(merged.tree, "facilities"):
        seen: set[str] = set()
        for below, name, spelling in _list_spellings(facility):
            key: Key = ("facilities", at, *below)
            meant, first = meanings.setdefault(spelling, (name, key))
            if spelling in seen:
                yield _issue(
                    merged,
                    key,
                    "the same spelling twice in one facility.",
                    given=repr(spelling),
                    remedy="Remove one of them.",
                )
            elif meant != name:
                yield _issue(
                    merged,
                    key,
                    f"means `{meant}` at {merged.say_place(first)}, here `{name}`.",
                    given=repr(spelling),
                    remedy="A wrong authority is a wrong patient: keep one meaning.",
                )
            seen.add(spelling)


def _check_ports(merged: Merged, _known: Known) -> Iterator[Issue]:
    """Two servers of ours on one port."""
    tree = merged.tree
    keys: list[Key] = [("receiver", "port"), ("listener", "port")]
    health = tree.get("health")
    keys += [("health", name) for name in (health if isinstance(health, dict) else {}) if name != "host"]
    values = []
    for key in keys:
        section = tree.get(str(key[0]))
        port = section.get(str(key[1])) if isinstance(section, dict) else None
        if str(port).isdigit() and int(str(port)) > 0:
            values.append((key, int(str(port))))
    for key, first in _find_repeats(values):
        yield _issue(
            merged,
            key,
            f"the port of `{merged.spell(first)}`.",
            given=str(dict(values)[key]),
            remedy="Give each server its own port; 0 takes a free one.",
        )


def _list_texts(node: Any, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(node, dict):
        for name, below in node.items():
            yield from _list_texts(below, (*key, name))
    elif isinstance(node, list):
        for at, below in enumerate(node):
            yield from _list_texts(below, (*key, at))
    elif isinstance(node, str):
        yield key, node


def is_file_key(key: Key) -> bool:
    """Whether a setting names a file that must be there."""
    name = str(key[-1])
    return name == "mapping_overlay" or name.endswith("_location") or key[-2:-1] == ("tls",)


def _check_files(merged: Merged, _known: Known) -> Iterator[Issue]:
    for key, text in _list_texts(merged.tree, ()):
        if is_file_key(key) and not Path(text).is_file():
            yield _issue(
                merged,
                key,
                "no such file.",
                given=repr(text),
                remedy="Correct the path; a relative one begins in the folder of the configuration file.",
            )


def _check_overlays(merged: Merged, _known: Known) -> Iterator[Issue]:
    """What is wrong inside the mapping overlays of facilities: a worker would refuse to start with them."""
    for at, facility in _list(merged.tree, "facilities"):
        text = facility.get("mapping_overlay")
        if isinstance(text, str) and Path(text).is_file():
            key = merged.spell(("facilities", at, "mapping_overlay"))
            for problem in check_files([Path(text)]):
                place = f"{show_path(Path(problem.file))}:{problem.line}"
                yield Issue(key=f"{key}: {problem.field}", place=place, problem=problem.detail, remedy=problem.remedy)


def _check_urls(merged: Merged, _known: Known) -> Iterator[Issue]:
    """A password inside a URL would be printed wherever the URL is."""
    for key, text in _list_texts(merged.tree, ()):
        if "://" not in text or "@" not in text:
            continue
        try:
            password = urlsplit(text).password
        except ValueError:
            continue
        if password:
            yield _issue(
                merged,
                key,
                "holds a password.",
                given=repr(hide_credentials(text)),
                remedy="Take it out of the URL and set `password` beside it as `env:NAME` or `file:/path`.",
            )
