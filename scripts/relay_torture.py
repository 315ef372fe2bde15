"""Kills a relay at random moments under load, and looks whether anything it acknowledged is lost or stands there twice.

    python scripts/relay_torture.py --kills 200 --publishers 8
    python scripts/relay_torture.py --kills 200 --publishers 8 --redis    kills the Redis server below it instead

Publishers are processes of their own and keep what was acknowledged to them. Prints one JSON object; exit status 1
where a message was lost or doubled, the sequence has a gap, or a restart did not serve within two seconds.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import grpc

from cz_jax.swarm.envelope import GROUP, content_hash, seal
from cz_jax.swarm.identity import new_identity
from cz_jax.swarm.relay_pb2 import Envelope, FetchRequest, PublishRequest
from cz_jax.swarm.relay_pb2_grpc import RelayStub

RUN, CALL_SECONDS, RETRY_SECONDS, SERVE_SECONDS = "torture", 5.0, 0.05, 2.0
START_SECONDS = 60.0
FREELY = ("--peer-rate", "1000000", "--retain-mb", "65536")


def publish(address: str, out: str, stop, batch: int, size: int) -> None:
    """Publishes until `stop`; one line of JSON a acknowledged batch: seconds, and (content hash, sequence) pairs. A
    batch that was not acknowledged is sent again as it is."""
    identity, number = new_identity(), time.time_ns() // 1000
    stub = RelayStub(grpc.insecure_channel(address, [("grpc.max_reconnect_backoff_ms", 200)]))
    pending = None
    with open(out, "w") as file:
        while not stop.is_set():
            if pending is None:
                numbers = range(number + 1, number + batch + 1)
                number = numbers[-1]
                now = int(time.time() * 1000)
                pending = [seal(identity, RUN, GROUP, n, now, os.urandom(size)) for n in numbers]
            begun = time.monotonic()
            try:
                reply = stub.Publish(PublishRequest(run=RUN, envelopes=pending), timeout=CALL_SECONDS)
            except grpc.RpcError:
                time.sleep(RETRY_SECONDS)
                continue
            taken = [(content_hash(e).hex(), s) for e, s in zip(pending, reply.sequences, strict=True)]
            file.write(json.dumps([time.monotonic() - begun, taken]) + "\n")
            file.flush()
            pending = None


def start(data: str, port: int, more: Sequence[str] = FREELY) -> tuple[subprocess.Popen, str, float]:
    """(process, address, seconds until it served) of a relay with the options `more`."""
    begun = time.monotonic()
    call = [sys.executable, "-c", "import sys; from cz_jax.cli.main import main; sys.exit(main())", "relay"]
    listen = ["--listen", f"127.0.0.1:{port}", "--data", data, *more]
    process = subprocess.Popen([*call, *listen], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    serving = json.loads(process.stderr.readline())
    threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the relay
    return process, serving["address"], time.monotonic() - begun


class FolderVictim:
    """A relay that keeps its log in a folder; the relay is what gets killed."""

    def __init__(self, folder: pathlib.Path):
        self._data = str(folder / "relay")
        self.relay, self.address, self.first = start(self._data, 0)

    def kill(self) -> float:
        """Seconds from the new start until it serves."""
        self.relay.kill()
        self.relay.wait()
        self.relay, _, seconds = start(self._data, int(self.address.rpartition(":")[2]))
        return seconds

    def close(self) -> None:
        pass


class RedisVictim:
    """A relay over a Redis server of our own that syncs every write; the server is what gets killed."""

    def __init__(self, folder: pathlib.Path):
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if program is None:
            raise SystemExit("no valkey-server or redis-server here: apt install redis-server")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._call = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
                      "--appendonly", "yes", "--appendfsync", "always"]  # fmt: skip
        self._run_server()
        for _ in range(100):  # until the server listens
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                break
            time.sleep(0.05)
        self.relay, self.address, self.first = start(f"redis://127.0.0.1:{port}/0", 0)

    def kill(self) -> float:
        """Seconds from the server's new start until the relay serves again."""
        self.close()
        begun = time.monotonic()
        self._run_server()
        with grpc.insecure_channel(self.address) as channel:
            while time.monotonic() - begun < START_SECONDS:
                with contextlib.suppress(grpc.RpcError):
                    RelayStub(channel).Fetch(FetchRequest(run=RUN, kind=GROUP, limit=1), timeout=CALL_SECONDS)
                    break
                time.sleep(RETRY_SECONDS)
        return time.monotonic() - begun

    def close(self) -> None:
        self._server.kill()
        self._server.wait()

    def _run_server(self) -> None:
        self._server = subprocess.Popen(self._call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def read_all(address: str) -> tuple[dict[str, int], int]:
    """(content hash -> sequence) of the whole log, and how many messages stand there twice. ValueError for a gap."""
    stub, found, twice, after = RelayStub(grpc.insecure_channel(address)), {}, 0, 0
    while True:
        page = stub.Fetch(FetchRequest(run=RUN, kind=GROUP, after=after, limit=256), timeout=30)
        for entry in page.entries:
            key = content_hash(Envelope.FromString(entry.envelope)).hex()
            twice += key in found
            found[key] = entry.sequence
        after = page.next
        if after >= page.head:
            if sorted(found.values()) != list(range(1, page.head + 1)):
                raise ValueError("the sequence has a gap")
            return found, twice


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--publishers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=1.0, help="the longest time between start and kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--redis", action="store_true", help="a relay over Redis, whose server is killed")
    given = parser.parse_args()
    rng, context = random.Random(given.seed), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        victim = (RedisVictim if given.redis else FolderVictim)(pathlib.Path(folder))
        stop, outs = context.Event(), [str(pathlib.Path(folder) / f"publisher-{i}") for i in range(given.publishers)]
        publishers = [
            context.Process(target=publish, args=(victim.address, out, stop, given.batch, given.bytes)) for out in outs
        ]
        for p in publishers:
            p.start()
        starts, begun = [victim.first], time.monotonic()
        for i in range(given.kills):
            time.sleep(rng.uniform(0.0, given.seconds))
            starts.append(victim.kill())
            print(f"kill {i + 1} of {given.kills}: served again after {starts[-1]:.2f} s", file=sys.stderr)
        time.sleep(given.seconds)
        seconds = time.monotonic() - begun
        stop.set()
        for p in publishers:
            p.join(3 * CALL_SECONDS)
        lines = [json.loads(line) for out in outs for line in pathlib.Path(out).read_text().splitlines()]
        found, twice = read_all(victim.address)
        victim.relay.send_signal(signal.SIGTERM)
        victim.relay.wait(15)
        victim.close()
    told = {"store": "redis" if given.redis else "folder", "kills": given.kills} | judge(lines, found, starts, seconds)
    print(json.dumps(told | {"doubled": twice}))
    return int(told["lost"] > 0 or twice > 0 or told["starts_over_2_s"] > 0 or victim.relay.returncode != 0)


def judge(lines: list, found: dict[str, int], starts: list[float], seconds: float) -> dict:
    """What became of the acknowledged batches `lines` in the log that was `found`."""
    acknowledged = {key: sequence for _, taken in lines for key, sequence in taken}
    calls = sorted(took for took, _ in lines)
    return {
        "acknowledged": len(acknowledged), "stored": len(found),
        "lost": sum(found.get(key) != sequence for key, sequence in acknowledged.items()),
        "starts_over_2_s": sum(s > SERVE_SECONDS for s in starts),
        "median_start": round(sorted(starts)[len(starts) // 2], 3), "slowest_start": round(max(starts), 3),
        "seconds": round(seconds, 1), "acknowledged_per_second": round(len(acknowledged) / seconds, 1),
        "publish_p50": round(calls[len(calls) // 2], 4), "publish_p99": round(calls[len(calls) * 99 // 100], 4),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
