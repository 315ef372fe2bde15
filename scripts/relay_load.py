"""What a relay with a folder carries, measured from processes of their own on loopback. Prints one JSON object.

    python scripts/relay_load.py publish --publishers 8       groups a second, and how long a publish call takes
    python scripts/relay_load.py readers --idle 1000 --active 50    memory of the relay with so many readers
    python scripts/relay_load.py quota --publishers 4         what one peer far beyond its quota costs the others
    python scripts/relay_load.py soak --seconds 3600 --rate 100 --log FILE    memory over time, retention at work

Messages are sealed before the clock starts: signing is the publishers' work. `relay_cpu_us` is what one message costs
the relay's process, however busy the machine is. Exit status 1 where a call failed that should not have.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import tempfile
import time

import grpc
from relay_torture import RUN, start

from cz_jax.swarm.envelope import GROUP, PROPOSAL, seal
from cz_jax.swarm.identity import new_identity
from cz_jax.swarm.relay_pb2 import FetchRequest, PublishReply, PublishRequest
from cz_jax.swarm.relay_pb2_grpc import RelayStub

CALL_SECONDS, WAIT_MS, FILES = 30.0, 30_000, 8192
TICKS = os.sysconf("SC_CLK_TCK")
PUBLISH = "/cz.relay.v1.Relay/Publish"


class Sealer:
    """Signed batches of one identity, as the bytes that are sent."""

    def __init__(self, batch: int, size: int):
        self._identity, self._number, self._batch, self._size = new_identity(), time.time_ns() // 1000, batch, size

    def __call__(self) -> bytes:
        self._number += self._batch
        now = int(time.time() * 1000)
        envelopes = [
            seal(self._identity, RUN, GROUP, self._number + i, now, os.urandom(self._size)) for i in range(self._batch)
        ]
        return PublishRequest(run=RUN, envelopes=envelopes).SerializeToString()


def publisher(address: str, calls: int, pause: float, batch: int, size: int, ready, go, out) -> None:
    """Seals `calls` batches, says so, and publishes them one after the other from `go` on, `pause` seconds between two
    beginnings; puts a list of (begin, end, status or "") on `out`."""
    channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
    call = channel.unary_unary(PUBLISH, response_deserializer=PublishReply.FromString)
    sealer, told = Sealer(batch, size), []
    batches = [sealer() for _ in range(calls)]
    ready.release()
    go.wait()
    next_at = time.monotonic()
    for data in batches:
        time.sleep(max(0.0, next_at - time.monotonic()))
        begun = time.monotonic()
        next_at = max(next_at + pause, begun)
        try:
            call(data, timeout=CALL_SECONDS)
            status = ""
        except grpc.RpcError as e:
            status = e.code().name
        told.append((begun, time.monotonic(), status))
    out.put(told)


class Load:
    """Publishers that have sealed what they send and wait for `go`."""

    def __init__(self, address: str, plans: list[tuple[int, float, int]], size: int):
        context = multiprocessing.get_context("spawn")
        ready, self._go = context.Semaphore(0), context.Event()
        self._outs = [context.SimpleQueue() for _ in plans]
        self._processes = [
            context.Process(target=publisher, args=(address, *plan, size, ready, self._go, out), daemon=True)
            for plan, out in zip(plans, self._outs, strict=True)
        ]
        for p in self._processes:
            p.start()
        for _ in plans:
            ready.acquire()

    def run(self) -> list[list[tuple[float, float, str]]]:
        """What each publisher told."""
        self._go.set()
        told = [out.get() for out in self._outs]
        for p in self._processes:
            p.join()
        return told


def usage(pid: int) -> tuple[float, int]:
    """(CPU seconds, resident bytes) of a process."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0]) << 10
    return (int(fields[11]) + int(fields[12])) / TICKS, resident


def quantile(values: list[float], q: float) -> float:
    values = sorted(values)
    return round(values[min(len(values) - 1, int(len(values) * q))], 4)


def taken(told: list[tuple[float, float, str]]) -> list[float]:
    """Seconds of the calls that were acknowledged."""
    return [end - begun for begun, end, status in told if not status]


def statuses(told: list[list[tuple[float, float, str]]]) -> dict[str, int]:
    failed = sorted(status for rows in told for *_, status in rows if status)
    return {name: len(list(rows)) for name, rows in itertools.groupby(failed)}


def measure_publish(relay, address: str, given) -> dict:
    load = Load(address, [(given.calls, 0.0, given.batch)] * given.publishers, given.bytes)
    before, _ = usage(relay.pid)
    told = load.run()
    used = usage(relay.pid)[0] - before
    begun, end = min(rows[0][0] for rows in told), min(rows[-1][1] for rows in told)  # while all of them publish
    groups = given.batch * sum(begun < e <= end and not status for rows in told for _, e, status in rows)
    calls = [seconds for rows in told for seconds in taken(rows)]
    return {
        "groups_per_second": round(groups / (end - begun), 1), "seconds": round(end - begun, 2), "groups": groups,
        "publish_p50": quantile(calls, 0.5), "publish_p99": quantile(calls, 0.99),
        "relay_cpu_us": round(used / (given.batch * len(calls)) * 1e6, 1), "failed": statuses(told),
    }  # fmt: skip


async def _read_on(stub, after: int, seconds: float) -> tuple[int, int]:
    """Follows the log for `seconds`; (messages, calls that failed)."""
    until, found, failed = time.monotonic() + seconds, 0, 0
    while (left := until - time.monotonic()) > 0:
        wait = min(WAIT_MS, int(left * 1000))
        try:
            reply = await stub.Fetch(
                FetchRequest(run=RUN, kind=GROUP, after=after, limit=256, wait_ms=wait),
                timeout=CALL_SECONDS + wait / 1000,
            )
        except grpc.aio.AioRpcError:
            failed += 1
            await asyncio.sleep(0.1)
        else:
            found, after = found + len(reply.entries), reply.next
    return found, failed


async def _readers(address: str, active: int, idle: int, seconds: float, start_load, resident) -> dict:
    """`idle` readers wait at a run where nothing comes, each over a connection of its own; `active` follow the log."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(active + idle)]
    stubs = [RelayStub(c) for c in channels]

    async def waits(stub) -> int:
        until, failed = time.monotonic() + seconds, 0
        while (left := until - time.monotonic()) > 0:
            quiet = FetchRequest(run=RUN + "-quiet", kind=GROUP, limit=1, wait_ms=min(WAIT_MS, int(left * 1000)))
            try:
                await stub.Fetch(quiet, timeout=CALL_SECONDS + WAIT_MS / 1000)
            except grpc.aio.AioRpcError:
                failed += 1
                await asyncio.sleep(0.1)
        return failed

    waiting = [asyncio.ensure_future(waits(s)) for s in stubs[active:]]
    reading = [asyncio.ensure_future(_read_on(s, 0, seconds)) for s in stubs[:active]]
    load, most = asyncio.get_running_loop().run_in_executor(None, start_load), 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await asyncio.sleep(0.25)
        most = max(most, resident())
    told, found = await load, await asyncio.gather(*reading)
    failed = sum(f for _, f in found) + sum(await asyncio.gather(*waiting))
    await asyncio.gather(*(c.close() for c in channels))
    return {"most": most, "told": told, "found": [n for n, _ in found], "failed": failed}


def measure_readers(relay, address: str, given) -> dict:
    pause = given.batch * given.publishers / given.rate
    calls = int(given.seconds / 2 / pause)
    load = Load(address, [(calls, pause, given.batch)] * given.publishers, given.bytes)
    empty = usage(relay.pid)[1]
    seen = asyncio.run(
        _readers(address, given.active, given.idle, given.seconds, load.run, lambda: usage(relay.pid)[1])
    )
    calls_taken = [seconds for rows in seen["told"] for seconds in taken(rows)]
    whole = given.batch * len(calls_taken)
    return {
        "idle": given.idle, "active": given.active, "resident_mib_before": empty >> 20,
        "resident_mib": seen["most"] >> 20, "groups": whole, "publish_p99": quantile(calls_taken, 0.99),
        "readers_with_all": sum(n == whole for n in seen["found"]),
        "failed": statuses(seen["told"]) | ({"fetch": seen["failed"]} if seen["failed"] else {}),
    }  # fmt: skip


def measure_quota(relay, address: str, given) -> dict:
    """Honest peers at half of their rate, without and with one that tries ten times its own."""
    rate, batch = given.peer_rate, max(1, int(given.peer_rate / 10))
    honest = (int(given.seconds * rate / 2 / batch), batch / (rate / 2), batch)
    greedy = (int(given.seconds * rate * 10 / batch), batch / (rate * 10), batch)
    alone = Load(address, [honest] * given.publishers, given.bytes).run()
    together = Load(address, [honest] * given.publishers + [greedy], given.bytes).run()
    before, after = ([s for rows in told for s in taken(rows)] for told in (alone, together[:-1]))
    seconds = together[-1][-1][1] - together[-1][0][0]
    return {
        "publish_p99_alone": quantile(before, 0.99), "publish_p99": quantile(after, 0.99),
        "p99_ratio": round(quantile(after, 0.99) / quantile(before, 0.99), 2),
        "publish_p50_alone": quantile(before, 0.5), "publish_p50": quantile(after, 0.5),
        "greedy_asked_per_second": round(len(together[-1]) * batch / seconds, 1),
        "greedy_taken_per_second": round(len(taken(together[-1])) * batch / seconds, 1),
        "greedy": statuses(together[-1:]), "failed": statuses(alone + together[:-1]),
    }  # fmt: skip


def slope(rows: list[tuple[float, int]]) -> float:
    """Least-squares change of the second column a unit of the first."""
    n = len(rows)
    mean_x, mean_y = sum(x for x, _ in rows) / n, sum(y for _, y in rows) / n
    over = sum((x - mean_x) ** 2 for x, _ in rows)
    return sum((x - mean_x) * (y - mean_y) for x, y in rows) / over if over else 0.0


def _publish_steadily(address: str, rate: float, batch: int, size: int, seconds: float) -> None:
    """`rate` messages a second, of a new identity every minute: what a relay keeps of a peer has to stay bounded."""
    call = grpc.insecure_channel(address).unary_unary(PUBLISH, response_deserializer=PublishReply.FromString)
    begun = time.monotonic()
    for i in itertools.count():
        if i % max(1, int(60 * rate / batch)) == 0:
            sealer = Sealer(batch, size)
        data = sealer()
        time.sleep(max(0.0, begun + i * batch / rate - time.monotonic()))
        if time.monotonic() - begun > seconds:
            return
        call(data, timeout=CALL_SECONDS)


def _follow(address: str, readers: int, seconds: float) -> None:
    async def follow():
        async with grpc.aio.insecure_channel(address) as channel:
            await asyncio.gather(*(_read_on(RelayStub(channel), 0, seconds) for _ in range(readers)))

    asyncio.run(follow())


def measure_soak(relay, address: str, given) -> dict:
    """A line of JSON to --log every ten seconds. Memory is said to have settled after the first quarter."""
    context = multiprocessing.get_context("spawn")
    work = (address, given.rate, given.batch, given.bytes, given.seconds), (address, given.active, given.seconds)
    processes = [
        context.Process(target=f, args=w, daemon=True) for f, w in zip((_publish_steadily, _follow), work, strict=True)
    ]
    for p in processes:
        p.start()
    rows, head, begun = [], 0, time.monotonic()
    with open(given.log, "w") as log:
        while (at := time.monotonic() - begun) < given.seconds and not any(p.exitcode for p in processes):
            cpu, resident = usage(relay.pid)
            rows.append((at / 3600, resident / (1 << 20)))
            line = {"seconds": round(at, 1), "resident_mib": round(rows[-1][1], 2), "cpu_seconds": round(cpu, 2)}
            floor, head = bounds(address, head)
            print(json.dumps(line | {"floor": floor, "head": head}), file=log, flush=True)
            time.sleep(10.0)
    for p in processes:
        p.join(2 * CALL_SECONDS)
    settled = [row for row in rows if row[0] >= rows[-1][0] / 4]
    return {
        "seconds": round(rows[-1][0] * 3600), "resident_mib_first": round(rows[0][1], 1),
        "resident_mib_most": round(max(m for _, m in rows), 1), "resident_mib_last": round(rows[-1][1], 1),
        "settled_mib_per_hour": round(slope(settled), 2),
        "failed": {p.name: p.exitcode for p in processes if p.exitcode != 0},
    }  # fmt: skip


def bounds(address: str, after: int) -> tuple[int, int]:
    """Floor and head of the log; `after`: a head known before."""
    with grpc.insecure_channel(address) as channel:
        request = FetchRequest(run=RUN, kind=PROPOSAL, after=after, limit=1)
        reply = RelayStub(channel).Fetch(request, timeout=CALL_SECONDS)
    return reply.floor, reply.head


MEASURES = {"publish": measure_publish, "readers": measure_readers, "quota": measure_quota, "soak": measure_soak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--publishers", type=int, default=8)
    parser.add_argument("--calls", type=int, default=100, help="publish: batches of each publisher")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--active", type=int, default=50, help="readers that follow the log")
    parser.add_argument("--rate", type=float, default=100.0, help="readers, soak: messages a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="readers, quota (each part), soak")
    parser.add_argument("--peer-rate", type=float, default=100.0, help="quota: what one peer may publish a second")
    parser.add_argument("--retain-mb", type=int, default=65536)
    parser.add_argument("--log", default=os.devnull, help="soak: where a line goes every ten seconds")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, max(FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
    rate = given.peer_rate if given.what == "quota" else 1e6
    with tempfile.TemporaryDirectory() as folder:
        more = ["--peer-rate", str(rate), "--retain-mb", str(given.retain_mb)]
        relay, address, _ = start(str(pathlib.Path(folder) / "relay"), 0, more)
        try:
            told = MEASURES[given.what](relay, address, given)
        finally:
            relay.send_signal(signal.SIGTERM)
            relay.wait(15)
    print(json.dumps({"measure": given.what} | told))
    return int(bool(told["failed"]) or relay.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
