"""A relay and two peers on three hosts, which are network namespaces of this machine; one is cut off and healed.

    python scripts/three_hosts.py --cut 60

Needs root and iproute2; says so, with status 0, where there are none. The peers share a group a second each over
`SwarmExchange`, as nodes do between rounds; no model is needed. Prints one JSON object; exit status 1 where a turn of a
peer took longer than its deadline, the peer that was not cut off was disturbed, or a group never arrived.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from cz_jax.config import SwarmConfig
from cz_jax.nouns import Group, Rollout, Task
from cz_jax.swarm.client import SwarmExchange
from cz_jax.swarm.identity import new_identity
from cz_jax.swarm.link import Link, LinkOptions

PORT, TURN_SECONDS, HEAL_SECONDS, LEAD_SECONDS = 7443, 1.0, 45.0, 8.0
FETCH_SECONDS, SLACK_SECONDS = 2.0, 3.0  # of a turn: twice the first and some
AT_ONCE = 64  # so that a peer sees all that the other kept, and no sample of it
PEERS = ("left", "right")


def namespace(name: str) -> str:
    return f"cz-{name}-{os.getpid()}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def build_network() -> None:
    """The relay's host, with a cable to each peer's: 10.77.1.0/24 and 10.77.2.0/24."""
    for name in ("relay", *PEERS):
        ip("netns", "add", namespace(name))
        ip("-n", namespace(name), "link", "set", "lo", "up")
    for i, name in enumerate(PEERS, 1):
        far = ("peer", "name", "eth0", "netns", namespace(name))
        ip("-n", namespace("relay"), "link", "add", name, "type", "veth", *far)
        for where, device, host in ((namespace("relay"), name, 1), (namespace(name), "eth0", 2)):
            ip("-n", where, "addr", "add", f"10.77.{i}.{host}/24", "dev", device)
            ip("-n", where, "link", "set", device, "up")


def remove_network() -> None:
    for name in ("relay", *PEERS):
        subprocess.run(["ip", "netns", "del", namespace(name)], capture_output=True)


def inside(name: str, *words: str, **more) -> subprocess.Popen:
    return subprocess.Popen(["ip", "netns", "exec", namespace(name), *words], text=True, **more)


def peer(address: str, name: str, seconds: float) -> None:
    """A line of JSON a turn: what came, how long it took, whether the relay was away, what was said."""
    link, said = Link(LinkOptions(address, "hosts"), new_identity()), []
    config = SwarmConfig(relay=address, insecure=True, fetch_seconds=FETCH_SECONDS, per_peer=2 * AT_ONCE)
    exchange = SwarmExchange(link, config, 2, 0, lambda t: t, lambda event, **fields: said.append(fields["text"]))
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        number, begun = number + 1, time.monotonic()
        task = Task("proposer", f"Write f for {name}, turn {number}.", ("assert f(1) == 2",), "f", 2)
        exchange.publish([Group(task, link.peer, "ab" * 32, number, (Rollout("a", True), Rollout(name, True)))])
        came = [g.round for g in exchange.fetch(AT_ONCE, number)]
        took = time.monotonic() - begun
        line = {"turn": number, "at": time.time(), "took": took, "down": link.down, "came": came, "kept": link.kept}
        print(json.dumps(line | {"said": said[:]}), flush=True)
        said.clear()
        time.sleep(max(0.0, TURN_SECONDS - took))
    link.close()


def play(folder: pathlib.Path, cut: float) -> tuple[dict[str, list[dict]], float, float]:
    """(what each peer told, when one was cut off, when it was healed)."""
    entry = "import sys; from cz_jax.cli.main import main; sys.exit(main())"
    listen = ["relay", "--listen", f"0.0.0.0:{PORT}", "--insecure", "--data", str(folder / "data")]
    processes = [
        inside("relay", sys.executable, "-c", entry, *listen, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    ]
    try:
        json.loads(processes[0].stderr.readline())
        for i, name in enumerate(PEERS, 1):
            words = [sys.executable, __file__, "--peer", f"10.77.{i}.1:{PORT}", "--name", name]
            words += ["--seconds", str(LEAD_SECONDS + cut + HEAL_SECONDS)]
            with open(folder / name, "w") as out:
                processes.append(inside(name, *words, stdout=out))
        time.sleep(LEAD_SECONDS)
        ip("-n", namespace("relay"), "link", "set", PEERS[1], "down")
        away = time.time()
        time.sleep(cut)
        ip("-n", namespace("relay"), "link", "set", PEERS[1], "up")
        back = time.time()
        for p in processes[1:]:
            p.wait(2 * HEAL_SECONDS)
    finally:
        for p in processes:
            p.terminate()
            p.wait(20)
    told = {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in PEERS}
    return told, away, back


def judge(told: dict[str, list[dict]], away: float, back: float) -> dict:
    calm, cut_off = (told[name] for name in PEERS)
    arrived = {n for line in calm for n in line["came"]}
    last = [line["turn"] for line in cut_off if not line["kept"]][-1:] or [0]
    healed = [line["at"] for line in cut_off if line["at"] > back and line["came"]]
    return {
        "turns": {name: len(lines) for name, lines in told.items()},
        "slowest_turn": {name: round(max(line["took"] for line in lines), 2) for name, lines in told.items()},
        "came_while_cut_off": sum(len(x["came"]) for x in cut_off if away + TURN_SECONDS < x["at"] < back),
        "calm_peer_ever_down": any(line["down"] for line in calm),
        "most_kept": max(line["kept"] for line in cut_off), "kept_at_end": cut_off[-1]["kept"],
        "seconds_until_healed": round(healed[0] - back, 1) if healed else None,
        "groups_lost": len(set(range(1, last[0])) - arrived - {line["turn"] for line in cut_off[-3:]}),
        "said": [text for line in cut_off for text in line["said"]],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cut", type=float, default=60.0, help="seconds for which one host is cut off")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        peer(given.peer, given.name, given.seconds)
        return 0
    if os.geteuid() != 0 or shutil.which("ip") is None:
        print(json.dumps({"skipped": "network namespaces need root and iproute2 (apt install iproute2)"}))
        return 0
    try:
        build_network()
    except subprocess.CalledProcessError as e:
        remove_network()
        print(json.dumps({"skipped": f"no network namespaces here: {e.stderr.strip()}"}))
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            told = judge(*play(pathlib.Path(folder), given.cut))
    finally:
        remove_network()
    print(json.dumps(told))
    slow = max(told["slowest_turn"].values()) > 2 * FETCH_SECONDS + SLACK_SECONDS
    wrong = told["calm_peer_ever_down"] or told["groups_lost"] or told["kept_at_end"] > 2 or told["came_while_cut_off"]
    return int(slow or bool(wrong) or told["seconds_until_healed"] is None)


if __name__ == "__main__":
    sys.exit(main())
