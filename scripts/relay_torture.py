"""Kills a relay at random moments under load, and looks whether anything it acknowledged is lost or stands there twice.

    python scripts/relay_torture.py --kills 200 --publishers 8

Publishers are processes of their own and keep what was acknowledged to them. Prints one JSON object; exit status 1
where a message was lost or doubled, the sequence has a gap, or a restart did not serve within two seconds.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import grpc

from cz_jax.swarm.envelope import GROUP, content_hash, seal
from cz_jax.swarm.identity import new_identity
from cz_jax.swarm.relay_pb2 import Envelope, FetchRequest, PublishRequest
from cz_jax.swarm.relay_pb2_grpc import RelayStub

RUN, CALL_SECONDS, RETRY_SECONDS, SERVE_SECONDS = "torture", 5.0, 0.05, 2.0


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


def start(data: str, port: int) -> tuple[subprocess.Popen, str, float]:
    """(process, address, seconds until it served)."""
    begun = time.monotonic()
    call = [sys.executable, "-c", "import sys; from cz_jax.cli.main import main; sys.exit(main())", "relay"]
    listen = ["--listen", f"127.0.0.1:{port}", "--data", data, "--peer-rate", "100000", "--retain-mb", "65536"]
    process = subprocess.Popen([*call, *listen], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    serving = json.loads(process.stderr.readline())
    return process, serving["address"], time.monotonic() - begun


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
    given = parser.parse_args()
    rng, context = random.Random(given.seed), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        data = str(pathlib.Path(folder) / "relay")
        relay, address, first = start(data, 0)
        port = int(address.rpartition(":")[2])
        stop, outs = context.Event(), [str(pathlib.Path(folder) / f"publisher-{i}") for i in range(given.publishers)]
        publishers = [
            context.Process(target=publish, args=(address, out, stop, given.batch, given.bytes)) for out in outs
        ]
        for p in publishers:
            p.start()
        starts, begun = [first], time.monotonic()
        for i in range(given.kills):
            time.sleep(rng.uniform(0.0, given.seconds))
            relay.kill()
            relay.communicate()
            relay, _, seconds = start(data, port)
            starts.append(seconds)
            print(f"kill {i + 1} of {given.kills}: served again after {seconds:.2f} s", file=sys.stderr)
        time.sleep(given.seconds)
        seconds = time.monotonic() - begun
        stop.set()
        for p in publishers:
            p.join(3 * CALL_SECONDS)
        lines = [json.loads(line) for out in outs for line in pathlib.Path(out).read_text().splitlines()]
        found, twice = read_all(address)
        relay.send_signal(signal.SIGTERM)
        relay.communicate(timeout=15)
    acknowledged = {key: sequence for _, taken in lines for key, sequence in taken}
    lost = sum(found.get(key) != sequence for key, sequence in acknowledged.items())
    calls = sorted(took for took, _ in lines)
    slow = sum(s > SERVE_SECONDS for s in starts)
    told = {
        "kills": given.kills, "acknowledged": len(acknowledged), "stored": len(found), "lost": lost, "doubled": twice,
        "starts_over_2_s": slow, "slowest_start": round(max(starts), 3), "seconds": round(seconds, 1),
        "acknowledged_per_second": round(len(acknowledged) / seconds, 1),
        "publish_p50": round(calls[len(calls) // 2], 4), "publish_p99": round(calls[len(calls) * 99 // 100], 4),
    }  # fmt: skip
    print(json.dumps(told))
    return int(lost > 0 or twice > 0 or slow > 0 or relay.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
