"""Patient identifiers in Redis: a projection of the topic `patients`, and the one door to Redis.

Layout, under a key prefix (``remitstream`` by default):

* ``<prefix>:id:<keyed hash>`` -> MessagePack of ``Entry``. No key holds an identifier in clear; values hold the MRN.
* ``<prefix>:offsets``, a hash: ``topic`` (id of `patients`), ``epoch``, ``format``, ``fresh_at`` (ms), and per
  partition the next offset to apply.

What holds, and how:

* **Offsets and data change together**, in one server-side script: "next offset n" says that everything below n is in.
* **Forward only.** The script skips records below the stored offset: a slow second projector cannot bring an old state
  back, and applying twice changes nothing.
* **Loss is seen.** A batch names the offset it begins at; when Redis has a lower one (an old snapshot, a failover that
  lost writes) or none (FLUSHALL), nothing is written and the writer is told where to replay from.
* **An epoch names one build.** A build from zero draws a new epoch; entries of other epochs count as absent, so
  leftovers of an earlier topic or a half-deleted data set can never answer.
* **Readers refuse** (``ProjectionBehind``) unless the offsets, read in the same transaction as the entries, have
  reached what the reader requires; what it requires never goes down.

Sharded Redis Cluster works only when all keys share one slot: choose a prefix in braces, ``{remitstream}``.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast
from urllib.parse import urlsplit

import msgspec
from pydantic import Field, SecretStr, field_validator, model_validator
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from identity.resolution import Entry, Known, Resolution, Walk, build_entry, is_own_number
from schemas.failure import ConfigurationError, TemporaryError
from schemas.tenancy import Strict
from telemetry.metrics import METRICS, Metric, Metrics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from schemas.events import PatientRecord, Reference
    from schemas.keys import HmacKey

T = TypeVar("T")

FORMAT = "1"
"""Of entries; a projection of another format is built anew."""
CHUNK = 1000
"""Identifiers in one round trip."""
MAX_STALE_MS = 6 * 86_400_000
"""A projection not touched for this long is built anew: `patients` keeps tombstones for seven days only, and a deletion
that was compacted away in between would never reach it."""
MAX_AHEAD_MS = 3_600_000
"""One touched so much later than now was touched under a wrong clock: its age is not known, so it counts as stale."""


class RedisDown(TemporaryError):
    """Redis does not answer, or refuses."""

    code = "RS240"
    meaning = "Redis does not answer in time, or refuses the command."
    default_remedy = (
        "Check `redis.url`, its credentials, memory and TLS settings; work resumes by itself when it is back."
    )


class ProjectionBehind(TemporaryError):
    """The patient projection is missing or not caught up, so that nobody's identity may be decided."""

    code = "RS241"
    meaning = "The patient projection in Redis is empty, or older than the topic it is made from."
    default_remedy = "Check that the projector runs (`remitstream project`); it replays by itself, then work resumes."


class RedisEvicts(ConfigurationError):
    """Redis would drop keys when memory is short, and a dropped patient looks unknown."""

    code = "RS140"
    meaning = "Redis is set to evict keys that have no time to live."
    default_remedy = "Set `maxmemory-policy noeviction` (or a `volatile-` policy) and enough memory."


class RedisFilesUnusable(ConfigurationError):
    """The authorities of the server's certificate cannot be used."""

    code = "RS141"
    meaning = "The file of the certificate authorities of Redis cannot be read."
    default_remedy = "Correct `redis.ca_location`: PEM, readable by this user."


def _check_authorities(file: str) -> None:
    try:
        ssl.create_default_context(cafile=file)
    except (OSError, ssl.SSLError) as error:
        raise RedisFilesUnusable(f"{type(error).__name__}.", place="redis.ca_location") from None


class RedisSettings(Strict):
    """Connection to Redis."""

    url: str = Field(default="redis://127.0.0.1:6379/0", description="`redis://host:port/db`, or `rediss://` for TLS.")
    username: str | None = Field(default=None, description="User of the access control list.")
    password: SecretStr | None = Field(default=None, description="Password of that user, or of the server.")
    ca_location: str | None = Field(
        default=None, description="PEM file of the certificate authorities, with `rediss://`."
    )
    key_prefix: str = Field(
        default="remitstream", pattern=r"^[A-Za-z0-9_.{}-]{1,64}$", description="Beginning of every key of ours."
    )
    socket_timeout_seconds: float = Field(default=1.0, gt=0, le=10, description="Longest wait for one answer.")
    deadline_seconds: float = Field(default=2.5, gt=0, le=30, description="Longest wait for one batch of look-ups.")

    @field_validator("url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
            raise ValueError("must be redis://host:port/db or rediss://host:port/db")
        if parts.username or parts.password or parts.query:
            raise ValueError("user, password and options have settings of their own and do not belong into the URL")
        return value

    @model_validator(mode="after")
    def _protected(self) -> RedisSettings:
        # Ignored, it would leave a connection open that is thought to be protected.
        if self.ca_location and not self.url.startswith("rediss://"):
            raise ValueError("ca_location is given, but url is not rediss://")
        return self

    @property
    def place(self) -> str:
        """Host and port, for messages."""
        parts = urlsplit(self.url)
        return f"{parts.hostname}:{parts.port or 6379}"


class Connection:
    """A small pool of connections with bounded waiting; every failure is ``RedisDown``.

    Belongs to one event loop. Two quick retries per command, then the caller's own pause decides; commands of ours may
    be run twice without harm.
    """

    def __init__(self, settings: RedisSettings) -> None:
        tls: dict[str, Any] = {}
        if settings.url.startswith("rediss://") and settings.ca_location:
            _check_authorities(settings.ca_location)
            tls["ssl_ca_certs"] = settings.ca_location
        password = settings.password.get_secret_value() if settings.password else None
        self.place = settings.place
        self._deadline = settings.deadline_seconds
        self._pool = BlockingConnectionPool.from_url(
            settings.url,
            max_connections=4,
            timeout=settings.socket_timeout_seconds,
            socket_timeout=settings.socket_timeout_seconds,
            socket_connect_timeout=settings.socket_timeout_seconds,
            socket_keepalive=True,
            health_check_interval=15,
            retry=Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.2), 2),
            decode_responses=False,
            protocol=2,
            username=settings.username,
            password=password,
            **tls,
        )
        self.client: Redis = Redis(connection_pool=self._pool)

    async def call(self, command: Callable[[], Awaitable[T]]) -> T:
        """Run commands under the deadline. Raises ``RedisDown``."""
        try:
            async with asyncio.timeout(self._deadline):
                return await command()
        except ReadOnlyError as error:
            # After a failover the old connections still lead to what is now a replica.
            await self._pool.disconnect()
            raise self._report(error) from None
        except (RedisError, OSError, TimeoutError) as error:
            raise self._report(error) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.aclose()

    def _report(self, error: Exception) -> RedisDown:
        name = type(error).__name__
        if isinstance(error, ResponseError):
            # The first word of a refusal is its code (OOM, NOAUTH, READONLY); the rest may quote the command.
            word = str(error).split(" ", 1)[0]
            name = f"{name} {word}" if word.isupper() and word.isalpha() else name
        return RedisDown(f"no answer ({name}).", place=self.place)


class State(msgspec.Struct, frozen=True):
    """What the offsets hash says. ``offsets``: next offset per partition."""

    topic: str
    epoch: str
    format: str
    fresh_at: int
    offsets: dict[int, int]


class Replay(msgspec.Struct, frozen=True):
    """Redis lost data: read on from these offsets.

    ``reason`` is ``MISSING``, ``OTHER_TOPIC``, ``OTHER_FORMAT``, ``STALE`` or ``BEHIND``.
    """

    offsets: dict[int, int]
    reason: str


class Change(msgspec.Struct, frozen=True):
    """One record of `patients`; ``record`` None is a tombstone."""

    key_hash: str
    record: PatientRecord | None
    partition: int
    offset: int


_BEGIN = """
-- Start a new build, unless someone else has done so since we looked.
-- KEYS: offsets.  ARGV: epoch we saw ('' for none), topic, new epoch, now, format, partitions...
local epoch = redis.call('HGET', KEYS[1], 'epoch') or ''
if epoch ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'topic', ARGV[2], 'epoch', ARGV[3], 'fresh_at', ARGV[4], 'format', ARGV[5])
for i = 6, #ARGV do redis.call('HSET', KEYS[1], ARGV[i], '0') end
return 1
"""

_APPLY = """
-- Apply records and move the offsets, or change nothing.
-- KEYS: offsets, entry keys...
-- ARGV: topic, epoch, now, number of partitions, then (partition, begins at, next) each,
--       then (partition, offset, value or '' for a tombstone) per entry key.
local held = redis.call('HMGET', KEYS[1], 'topic', 'epoch')
if held[1] ~= ARGV[1] or held[2] ~= ARGV[2] then return 0 end
local stored = {}
local at = 5
for _ = 1, tonumber(ARGV[4]) do
  local offset = tonumber(redis.call('HGET', KEYS[1], ARGV[at]))
  if not offset or offset < tonumber(ARGV[at + 1]) then return 0 end
  stored[ARGV[at]] = offset
  at = at + 3
end
for i = 2, #KEYS do
  if tonumber(ARGV[at + 1]) >= stored[ARGV[at]] then
    if ARGV[at + 2] == '' then redis.call('DEL', KEYS[i]) else redis.call('SET', KEYS[i], ARGV[at + 2]) end
  end
  at = at + 3
end
at = 5
for _ = 1, tonumber(ARGV[4]) do
  if tonumber(ARGV[at + 2]) > stored[ARGV[at]] then redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 2]) end
  at = at + 3
end
redis.call('HSET', KEYS[1], 'fresh_at', ARGV[3])
return 1
"""


class ProjectionWriter:
    """Writes the projection. Any number may run; the data only moves forward.

    ``topic_id`` is the id of the topic `patients`; ``now_ms`` the clock. All methods raise ``RedisDown``; after it the
    same call may be repeated.
    """

    def __init__(
        self,
        settings: RedisSettings,
        key: HmacKey,
        topic_id: str,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._connection = Connection(settings)
        self._prefix = settings.key_prefix
        self._offsets_key = f"{settings.key_prefix}:offsets"
        self._key = key
        self._topic_id = topic_id
        self._now_ms = now_ms
        self._epoch = ""
        self._positions: dict[int, int] = {}
        self._begin = self._connection.client.register_script(_BEGIN)
        self._apply = self._connection.client.register_script(_APPLY)

    async def read_state(self) -> State | None:
        """What Redis says it holds, or None when it holds nothing usable."""
        return _parse_state(await self._read_raw())

    async def check_policy(self) -> None:
        """Raise ``RedisEvicts`` when Redis is set to drop keys like ours."""
        memory = await self._connection.call(lambda: self._connection.client.info("memory"))
        policy = str(memory.get("maxmemory_policy", ""))
        if policy.startswith("allkeys-") and int(memory.get("maxmemory", 0)) > 0:
            raise RedisEvicts(f"maxmemory-policy is {policy}.", place=self._connection.place)

    async def begin(self, partitions: Sequence[int]) -> Replay | None:
        """Take up the build that is there, or start one from zero. ``positions`` then says where to read from.

        None means that the build there was taken up as it is; a ``Replay`` says why a new one was started.
        """
        await self.check_policy()
        while True:
            raw = await self._read_raw()
            state = _parse_state(raw)
            reason = self._judge(state, partitions)
            if state is not None and reason is None:
                self._epoch = state.epoch
                self._positions = {partition: state.offsets[partition] for partition in partitions}
                return None
            # A build begun by another writer since we looked is taken up in the next round, not begun again.
            epoch = secrets.token_hex(8)
            arguments = [raw.get(b"epoch", b""), self._topic_id, epoch, self._now_ms(), FORMAT, *partitions]
            if await self._run(self._begin, [self._offsets_key], arguments):
                self._epoch = epoch
                self._positions = dict.fromkeys(partitions, 0)
                return Replay(dict(self._positions), reason or "MISSING")

    @property
    def positions(self) -> dict[int, int]:
        """Next offset of each partition in Redis, as last seen or written here."""
        return dict(self._positions)

    async def apply(
        self, changes: Sequence[Change], begins: Mapping[int, int], next_offsets: Mapping[int, int]
    ) -> Replay | None:
        """Apply what was read from ``begins`` up to ``next_offsets`` (per partition), all or nothing.

        With no changes and equal offsets it only checks and refreshes. Returns a ``Replay`` when Redis does not hold
        everything below ``begins``; then nothing was written, and reading must go on from the offsets it names.
        """
        keys = [self._offsets_key]
        arguments: list[Any] = [self._topic_id, self._epoch, self._now_ms(), len(begins)]
        for partition, begin in begins.items():
            arguments += [partition, begin, next_offsets[partition]]
        for change in changes:
            keys.append(f"{self._prefix}:id:{change.key_hash}")
            arguments += [change.partition, change.offset, self._encode(change.record)]
        if await self._run(self._apply, keys, arguments):
            for partition, offset in next_offsets.items():
                self._positions[partition] = max(offset, self._positions.get(partition, 0))
            return None
        replay = await self.begin(list(begins))
        return replay or Replay(self.positions, "BEHIND")

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def _read_raw(self) -> dict[bytes, bytes]:
        # The stubs cannot know that answers are not decoded to text.
        command = cast(
            "Callable[[], Awaitable[dict[bytes, bytes]]]", partial(self._connection.client.hgetall, self._offsets_key)
        )
        return await self._connection.call(command)

    async def _run(self, script: AsyncScript, keys: list[str], arguments: list[Any]) -> bool:
        return bool(await self._connection.call(lambda: script(keys=keys, args=arguments)))

    def _encode(self, record: PatientRecord | None) -> bytes:
        return b"" if record is None else msgspec.msgpack.encode(build_entry(record, self._key, self._epoch))

    def _judge(self, state: State | None, partitions: Sequence[int]) -> str | None:
        if state is None or not set(partitions) <= state.offsets.keys():
            return "MISSING"
        if state.format != FORMAT:
            return "OTHER_FORMAT"
        if state.topic != self._topic_id:
            return "OTHER_TOPIC"
        if not -MAX_AHEAD_MS <= self._now_ms() - state.fresh_at <= MAX_STALE_MS:
            return "STALE"
        return None


class Identities:
    """Looks up patients. One transaction per round, so that entries and offsets are of one moment.

    Call ``require`` with the end offsets of `patients` seen at start before the first look-up; until the projection has
    reached them, and whenever it falls back behind what was seen since, look-ups raise ``ProjectionBehind``.
    """

    def __init__(self, settings: RedisSettings, key: HmacKey, *, metrics: Metrics = METRICS) -> None:
        self._connection = Connection(settings)
        self._prefix = settings.key_prefix
        self._key = key
        self._metrics = metrics
        self._required: dict[int, int] | None = None
        self._topic_id: str | None = None
        self._decoder = msgspec.msgpack.Decoder(Entry)

    def require(self, end_offsets: Mapping[int, int], topic_id: str | None = None) -> None:
        """Raise what the projection must have reached (next offset per partition); never lowers it.

        ``topic_id``, when given, must be the id of the topic that the projection was made from.
        """
        required = self._required if self._required is not None else {}
        for partition, offset in end_offsets.items():
            required[partition] = max(offset, required.get(partition, 0))
        self._required = required
        self._topic_id = topic_id or self._topic_id

    async def resolve(self, refs: Sequence[Reference]) -> list[Resolution]:
        """The patients these identifiers belong to now, in the given order.

        Raises ``RedisDown`` and ``ProjectionBehind``; both mean: decide nothing, try again later.
        """
        return await self.resolve_hashes([self._key.hash_identifier(ref) for ref in refs])

    async def resolve_hashes(self, hashes: Sequence[str]) -> list[Resolution]:
        """As ``resolve``, by keyed hash of the identifier. One round trip, plus one per step of the longest chain."""
        started = time.perf_counter()
        results: dict[str, Resolution] = {}
        walks: list[Walk] = []
        wanted = list(dict.fromkeys(hashes))
        for key_hash, entry in (await self._fetch_all(wanted)).items():
            if entry is not None and entry.mrn is not None and is_own_number(entry, key_hash):
                # The ordinary case: no merge, nothing to walk.
                results[key_hash] = Known(entry.mrn)
            else:
                walks.append(Walk(key_hash))
                walks[-1].step(entry)
        open_walks = [walk for walk in walks if walk.result is None]
        while open_walks:
            entries = await self._fetch_all(list({walk.wanted: None for walk in open_walks}))
            for walk in open_walks:
                walk.step(entries[walk.wanted])
            open_walks = [walk for walk in open_walks if walk.result is None]
        results |= {walk.begin: walk.take_result() for walk in walks}
        self._metrics.observe(Metric.IDENTITY_SECONDS, time.perf_counter() - started)
        found = [results[key_hash] for key_hash in hashes]
        for kind, count in Counter(map(type, found)).items():
            self._metrics.add(Metric.IDENTITY_LOOKUPS, count, result=kind.__name__.lower())
        return found

    async def check(self) -> None:
        """Raise ``RedisDown`` or ``ProjectionBehind`` when a look-up would; for readiness."""
        await self._fetch([])

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _fetch_all(self, wanted: list[str]) -> dict[str, Entry | None]:
        entries: dict[str, Entry | None] = {}
        for start in range(0, len(wanted), CHUNK):
            entries |= await self._fetch(wanted[start : start + CHUNK])
        return entries

    async def _fetch(self, hashes: list[str]) -> dict[str, Entry | None]:
        raw, values = await self._connection.call(lambda: self._read(hashes))
        state = self._check_state(_parse_state(raw))
        decode, epoch = self._decoder.decode, state.epoch
        entries: dict[str, Entry | None] = {}
        try:
            for key_hash, value in zip(hashes, values, strict=True):
                entry = None if value is None else decode(value)
                entries[key_hash] = entry if entry is not None and entry.epoch == epoch else None
        except msgspec.MsgspecError:
            raise ProjectionBehind("an entry is not readable.", place=self._connection.place) from None
        return entries

    async def _read(self, hashes: list[str]) -> tuple[dict[bytes, bytes], list[bytes | None]]:
        async with self._connection.client.pipeline(transaction=True) as pipeline:
            pipeline.hgetall(f"{self._prefix}:offsets")
            if hashes:
                pipeline.mget([f"{self._prefix}:id:{key_hash}" for key_hash in hashes])
            answers = await pipeline.execute()
        return answers[0], answers[1] if hashes else []

    def _check_state(self, state: State | None) -> State:
        if self._required is None:
            raise ProjectionBehind("the end of `patients` is not known yet.", place=self._connection.place)
        if state is None or state.format != FORMAT:
            raise ProjectionBehind("Redis holds no projection.", place=self._connection.place)
        if self._topic_id is not None and state.topic != self._topic_id:
            raise ProjectionBehind("it was made from another topic.", place=self._connection.place)
        behind = sum(max(0, offset - state.offsets.get(partition, 0)) for partition, offset in self._required.items())
        if behind:
            raise ProjectionBehind(f"{behind} records are not applied yet.", place=self._connection.place)
        # What was seen applied once is required from now on: a Redis put back to an old snapshot shows here.
        self.require(state.offsets)
        return state


def _parse_state(raw: Mapping[bytes, bytes]) -> State | None:
    """The offsets hash as a state, or None when it is absent or not whole."""
    fields = {name.decode("ascii", "replace"): value.decode("ascii", "replace") for name, value in raw.items()}
    try:
        return State(
            topic=fields["topic"],
            epoch=fields["epoch"],
            format=fields["format"],
            fresh_at=int(fields["fresh_at"]),
            offsets={int(name): int(value) for name, value in fields.items() if name.isdigit()},
        )
    except (KeyError, ValueError):
        return None
