"""A `Store` in Redis or Valkey, which several relays may share: streams whose entry ids are the sequences.

Of a run R, under one prefix: the stream log:R (sequence-0 -> received, crc, envelope), one stream kind:R:K a kind
(sequence-0 -> peer, number, received, hash, size), the hash hash:R (content hash -> sequence), the set numbers:R
("peer number"), the hash dropped:R (peer -> highest number dropped) with the sorted set droppedat:R (when that was
received), and the hash meta:R (floor, head, bytes). A batch is appended, and retention done, by one Lua script each:
the server runs it whole and alone, so sequences are dense however many relays publish. It answers after its fsync,
which `appendonly yes` and `appendfsync always` make sure of; each new connection looks, and a server that is set up
otherwise is refused.

Where the connection breaks before the answer came, whether the batch was kept is not known; it was not acknowledged,
and the same batch once more is answered with the sequences it has. What this does not protect: a replica that takes
over may lack what its master had acknowledged.
"""

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from cz_jax.swarm import store as room
from cz_jax.swarm.envelope import KINDS
from cz_jax.swarm.store import Appended, Batch, Bounds, Conflict, Item, Stored, StoreError, StoreFailed

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError, RedisError, ResponseError, TimeoutError
    from redis.retry import Retry
except ImportError:
    raise StoreError(
        "a relay on Redis needs the Python package redis", "it is not installed", "pip install 'cz-jax[redis]'"
    ) from None

SCHEMES = ("redis", "rediss")
PREFIX = "{cz-relay}:"  # the braces keep all keys together where there are several nodes
FORMAT = b"1"
LEAST_VERSION = (6, 2)  # XTRIM MINID
CONNECT_SECONDS, ANSWER_SECONDS = 2.0, 5.0
LISTEN_SECONDS, AGAIN_SECONDS = 0.5, 0.5
WANTED = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}

# ARGV: prefix, run, now, most runs, then of each item: kind, peer, number, hash, crc, size, envelope. Numbers are of 20
# digits, so that they compare as text: Lua's own are float64. Everything is checked before anything is written.
_APPEND = """
local prefix, run, now = ARGV[1], ARGV[2], ARGV[3]
local meta, log, hashes = prefix .. 'meta:' .. run, prefix .. 'log:' .. run, prefix .. 'hash:' .. run
local numbers, dropped = prefix .. 'numbers:' .. run, prefix .. 'dropped:' .. run
local runs = prefix .. 'runs'
if redis.call('SISMEMBER', runs, run) == 0 and redis.call('SCARD', runs) >= tonumber(ARGV[4]) then
  return {'too_many_runs'}
end
local head = tonumber(redis.call('HGET', meta, 'head') or '0')
local fresh, used, result, bytes = {}, {}, {'ok'}, 0
for i = 5, #ARGV, 7 do
  local peer, number, hash = ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local known = fresh[hash] or redis.call('HGET', hashes, hash)
  if known then
    result[#result + 1] = tonumber(known)
    result[#result + 1] = 1
  else
    local name = peer .. ' ' .. number
    local last = redis.call('HGET', dropped, peer)
    if used[name] or redis.call('SISMEMBER', numbers, name) == 1 or (last and number <= last) then
      return {'replay', (i - 5) / 7}
    end
    head = head + 1
    fresh[hash], used[name] = head, i
    result[#result + 1] = head
    result[#result + 1] = 0
  end
end
local kinds = {}
for i = 5, #ARGV, 7 do
  local kind, peer, number, hash = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  if used[peer .. ' ' .. number] == i then
    local id = string.format('%.0f-0', fresh[hash])
    redis.call('XADD', log, id, 't', now, 'c', ARGV[i + 4], 'e', ARGV[i + 6])
    redis.call('XADD', prefix .. 'kind:' .. run .. ':' .. kind, id, 'p', peer, 'n', number, 't', now, 'h', hash,
      's', ARGV[i + 5])
    redis.call('HSET', hashes, hash, string.format('%.0f', fresh[hash]))
    redis.call('SADD', numbers, peer .. ' ' .. number)
    bytes = bytes + tonumber(ARGV[i + 5])
    kinds[kind] = true
  end
end
redis.call('SADD', runs, run)
redis.call('HSETNX', meta, 'floor', '1')
redis.call('HSET', meta, 'head', string.format('%.0f', head))
redis.call('HINCRBY', meta, 'bytes', bytes)
for kind in pairs(kinds) do redis.call('PUBLISH', prefix .. 'appended', run .. ' ' .. kind) end
return result
"""

# ARGV: prefix, before, most bytes, most entries, then the kinds. Returns how many were dropped.
_PRUNE = """
local prefix, before, most, step = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local runs, total, count = {}, 0, 0
local names = redis.call('SMEMBERS', prefix .. 'runs')
table.sort(names)
for _, name in ipairs(names) do
  local meta = redis.call('HMGET', prefix .. 'meta:' .. name, 'floor', 'head', 'bytes')
  runs[#runs + 1] = {name = name, floor = tonumber(meta[1]), head = tonumber(meta[2]), bytes = tonumber(meta[3])}
  total = total + tonumber(meta[3])
end
local function entry(run, sequence)
  local id = string.format('%.0f-0', sequence)
  for k = 5, #ARGV do
    local found = redis.call('XRANGE', prefix .. 'kind:' .. run.name .. ':' .. ARGV[k], id, id)
    if found[1] then
      local f = found[1][2]
      return {peer = f[2], number = f[4], received = tonumber(f[6]), hash = f[8], size = tonumber(f[10])}
    end
  end
  return nil
end
local function drop(run, e)
  if e then
    local dropped, at = prefix .. 'dropped:' .. run.name, prefix .. 'droppedat:' .. run.name
    redis.call('HDEL', prefix .. 'hash:' .. run.name, e.hash)
    redis.call('SREM', prefix .. 'numbers:' .. run.name, e.peer .. ' ' .. e.number)
    local last = redis.call('HGET', dropped, e.peer)
    if not last or last < e.number then redis.call('HSET', dropped, e.peer, e.number) end
    redis.call('ZADD', at, 'GT', e.received, e.peer)
    run.bytes, total = run.bytes - e.size, total - e.size
  end
  run.floor, run.changed, count = run.floor + 1, true, count + 1
end
for _, run in ipairs(runs) do
  local at = prefix .. 'droppedat:' .. run.name
  for _, peer in ipairs(redis.call('ZRANGEBYSCORE', at, '-inf', '(' .. ARGV[2])) do
    redis.call('HDEL', prefix .. 'dropped:' .. run.name, peer)
    redis.call('ZREM', at, peer)
  end
  while count < step and run.floor <= run.head do
    local e = entry(run, run.floor)
    if e and e.received >= before then break end
    drop(run, e)
  end
end
while count < step and total > most do
  local largest = runs[1]
  for _, run in ipairs(runs) do if run.bytes > largest.bytes then largest = run end end
  drop(largest, entry(largest, largest.floor))
end
for _, run in ipairs(runs) do
  if run.changed then
    local floor = string.format('%.0f', run.floor)
    redis.call('HSET', prefix .. 'meta:' .. run.name, 'floor', floor, 'bytes', string.format('%.0f', run.bytes))
    redis.call('XTRIM', prefix .. 'log:' .. run.name, 'MINID', '=', floor)
    for k = 5, #ARGV do redis.call('XTRIM', prefix .. 'kind:' .. run.name .. ':' .. ARGV[k], 'MINID', '=', floor) end
  end
end
return count
"""


@dataclass(frozen=True)
class Address:
    """Where a Redis is. `str()` of it holds no password."""

    host: str
    port: int
    database: int
    tls: bool
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"{SCHEMES[self.tls]}://{user}{host}:{self.port}/{self.database}"


def read_address(url: str) -> Address:
    """The parts of redis://[USER[:PASSWORD]@]HOST[:PORT][/DB] or rediss://... StoreError for anything else, which
    repeats nothing of it: what cannot be told apart may be the password."""
    try:
        parts = urlsplit(url)
        host, port, path = parts.hostname, parts.port or 6379, parts.path.removeprefix("/")
    except ValueError:
        parts, host, port, path = None, None, 0, ""
    extra = parts is None or parts.query or parts.fragment
    if extra or parts.scheme not in SCHEMES or not host or not (path == "" or (path.isascii() and path.isdigit())):
        raise StoreError(
            "--data is no address of a Redis", "a character of the password that has to be written as %XX?",
            "--data redis://HOST:PORT/DB, or rediss:// for TLS",
        )  # fmt: skip
    user, password = (None if text is None else unquote(text) for text in (parts.username, parts.password))
    return Address(host, port, int(path or 0), parts.scheme == "rediss", user or None, password)


class Unsafe(ResponseError):
    """A server that may lose what it has taken. `wrong`: the settings that say so, as they are."""

    def __init__(self, wrong: dict[str, str]):
        self.wrong = wrong
        super().__init__("it has " + ", ".join(f"{name} {value}" for name, value in wrong.items()))


class RedisStore:
    """A `Store` at `address`, for any number of processes. StoreError where it cannot be used."""

    def __init__(self, address: Address):
        self.address = address
        self.damaged = 0
        self._ended = threading.Event()
        self._listener: threading.Thread | None = None
        self._client = redis.Redis(
            host=address.host, port=address.port, db=address.database, ssl=address.tls, username=address.user,
            password=address.password, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=ANSWER_SECONDS,
            socket_keepalive=True, health_check_interval=15, retry=Retry(NoBackoff(), 1, (ConnectionError,)),
            redis_connect_func=_connected, protocol=2,
        )  # fmt: skip
        try:
            self._check_server()
            self._check_heads()
        except Unsafe as e:
            raise StoreError(
                f"{address} cannot be used: {e}",
                "what the relay acknowledges would be lost with a power cut, or given up for memory",
                "redis-cli CONFIG SET " + " ".join(f"{n} {WANTED[n]}" for n in e.wrong) + ", and in redis.conf too",
            ) from None
        except RedisError as e:
            raise StoreError(
                f"{address} cannot be used: {e}", "no server there, another password, or a right that is missing",
                "cz-jax relay --data with a folder needs none",
            ) from None  # fmt: skip

    def append(self, batches: Sequence[Batch], now_ms: int) -> list[list[Appended] | Conflict]:
        pipe = self._client.pipeline(transaction=False)
        for run, items in batches:
            arguments = [PREFIX, run, now_ms, room.MAX_RUNS]
            for i in items:
                crc, size = zlib.crc32(i.envelope), len(i.envelope)
                arguments += [i.kind, i.peer, f"{i.number:020d}", i.hash, crc, size, i.envelope]
            pipe.eval(_APPEND, 0, *arguments)
        told = self._done(pipe.execute)
        return [_appended(items, result) for (_, items), result in zip(batches, told, strict=True)]

    def bounds(self, run: str) -> Bounds:
        floor, head = self._done(self._client.hmget, _key("meta", run), "floor", "head")
        return Bounds(int(floor or 1), int(head or 0))

    def scan(self, run: str, kind: str, after: int, most: int) -> list[tuple[int, str]]:
        rows = self._done(self._client.xrevrange, _key("kind", run, kind), "+", f"({after}", most)
        return [(_sequence(at), fields[b"p"].decode()) for at, fields in reversed(rows)]

    def page(self, run: str, kind: str, after: int, most: int, most_bytes: int) -> tuple[list[Stored], int]:
        rows = self._done(self._client.xrange, _key("kind", run, kind), f"({after}", "+", most)
        wanted = room.within([(_sequence(at), int(fields[b"s"])) for at, fields in rows], most_bytes)
        return self.read(run, wanted), max([after, *wanted])

    def read(self, run: str, sequences: Sequence[int]) -> list[Stored]:
        pipe = self._client.pipeline(transaction=False)
        for sequence in sorted(sequences):
            pipe.xrange(_key("log", run), sequence, sequence)
        found = []
        for rows in self._done(pipe.execute):
            for at, fields in rows:
                if zlib.crc32(fields[b"e"]) == int(fields[b"c"]):
                    found.append(Stored(_sequence(at), int(fields[b"t"]), fields[b"e"]))
                else:
                    self.damaged += 1
        return found

    def prune(self, before_ms: int, most_bytes: int) -> int:
        return self._done(self._client.eval, _PRUNE, 0, PREFIX, before_ms, most_bytes, room.PRUNE_STEP, *KINDS)

    def size(self) -> tuple[int, int, int]:
        runs = self.runs()
        return len(runs), sum(b.head - b.floor + 1 for _, b, _ in runs), sum(size for *_, size in runs)

    def runs(self) -> list[tuple[str, Bounds, int]]:
        names = sorted(self._done(self._client.smembers, _key("runs")))
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            pipe.hmget(_key("meta", name.decode()), "floor", "head", "bytes")
        rows = self._done(pipe.execute) if names else []
        return [
            (n.decode(), Bounds(int(floor), int(head)), int(size))
            for n, (floor, head, size) in zip(names, rows, strict=True)
        ]

    def follow(self, appended: Callable[[Sequence[tuple[str, str]]], None]) -> None:
        self._listener = threading.Thread(target=self._listen, args=(appended,), name="relay redis", daemon=True)
        self._listener.start()

    def close(self) -> None:
        self._ended.set()
        if self._listener is not None:
            self._listener.join(LISTEN_SECONDS + AGAIN_SECONDS + 1)
        self._client.close()

    def _listen(self, appended: Callable[[Sequence[tuple[str, str]]], None]) -> None:
        while not self._ended.is_set():
            try:
                with self._client.pubsub(ignore_subscribe_messages=True) as channel:
                    channel.subscribe(_key("appended"))
                    appended([(run, kind) for run, *_ in self.runs() for kind in KINDS])  # what came meanwhile
                    while not self._ended.is_set():
                        message = channel.get_message(timeout=LISTEN_SECONDS)
                        if message is not None:
                            run, _, kind = message["data"].decode().partition(" ")
                            appended([(run, kind)])
            except (RedisError, StoreFailed):  # publishing tells of it; a reader's long poll ends at its deadline
                self._ended.wait(AGAIN_SECONDS)

    def _check_server(self) -> None:
        version = self._client.info("server")["redis_version"]
        if tuple(int(part) for part in version.split(".")[:2]) < LEAST_VERSION:
            least = ".".join(map(str, LEAST_VERSION))
            raise StoreError(f"{self.address} is Redis {version}", f"the relay needs {least} or newer, or Valkey")
        self._client.set(_key("format"), FORMAT, nx=True)
        if self._client.get(_key("format")) != FORMAT:
            raise StoreError(f"{self.address} holds the log of another version of cz-jax", "", "--data with another DB")

    def _check_heads(self) -> None:
        for run, bounds, _ in self.runs():
            rows = self._client.xrevrange(_key("log", run), count=1)
            last = _sequence(rows[0][0]) if rows else bounds.floor - 1
            if last != bounds.head:
                raise StoreError(f"{self.address}: run {run} should end at {bounds.head} and ends at {last}",
                                 "keys were deleted, or restored in part", "--data with another DB")  # fmt: skip

    def _done(self, call: Callable, *arguments):
        try:
            return call(*arguments)
        except (ConnectionError, TimeoutError) as e:  # readers are told too, and where it is concerns nobody
            raise StoreFailed(f"the Redis server does not answer ({type(e).__name__})") from e
        except RedisError as e:
            raise StoreFailed(f"the Redis server refuses: {e}") from e


def _connected(connection) -> None:
    """Unsafe unless the server that is at the other end now keeps what it acknowledges."""
    connection.on_connect()
    has = {}
    for name in WANTED:
        connection.send_command("CONFIG", "GET", name)
        told = connection.read_response()
        has[name] = told[1].decode() if len(told) == 2 else "unknown"
    wrong = {name: value for name, value in has.items() if value != WANTED[name]}
    if wrong:
        raise Unsafe(wrong)


def _key(*parts: str) -> str:
    return PREFIX + ":".join(parts)


def _sequence(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])


def _appended(items: Sequence[Item], result: list) -> list[Appended] | Conflict:
    if result[0] == b"too_many_runs":
        return room.too_many_runs()
    if result[0] == b"replay":
        return room.replay(items[result[1]])
    return [Appended(sequence, bool(known)) for sequence, known in zip(result[1::2], result[2::2], strict=True)]
