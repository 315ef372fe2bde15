"""The relay's page: its numbers, hostile text in a real browser, and what careless or hostile viewers get."""

import asyncio
import http.client
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import pytest

from cz_jax.nouns import Group, Rollout, Task
from cz_jax.swarm import page as room
from cz_jax.swarm import watch
from cz_jax.swarm.envelope import GROUP, PROPOSAL, group_payload, proposal_payload, seal
from cz_jax.swarm.identity import friendly_name, new_identity
from cz_jax.swarm.page import PageLimits, PageServer
from cz_jax.swarm.relay import RelayError, RelayOptions, RelayThread
from cz_jax.swarm.relay_pb2 import PublishRequest
from cz_jax.swarm.relay_pb2_grpc import RelayStub
from cz_jax.swarm.store import Item, MemoryStore, SqliteStore, StoreFailed
from cz_jax.swarm.watch import MINUTE_MS, Tally, Watcher, encoded, visible

ROOT = Path(__file__).resolve().parents[1]
NOW = 30_000_000 * MINUTE_MS + 5000
HOSTILE = (
    "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    "<svg onload=alert(1)></svg> {{7*7}} ${7*7} javascript:alert(1)\n\x07\x1b[2J\u202egnihton\u2066 &lt;b&gt; end"
)


def task(question="Write f.", level=2, source="proposer"):
    return Task(source, question, ("assert f(1) == 2", "assert f(2) == 3"), "f", level)


def group(question="Write f.", number=7, ended=(True, False), **more):
    return group_payload(Group(task(question, **more), "p", "ab" * 32, number, tuple(Rollout("x", e) for e in ended)))


# ---- the numbers


def test_counts_by_peer_kind_and_minute():
    tally = Tally(NOW)
    tally.count("a", GROUP, ["p", "q", "p"], NOW - 2 * MINUTE_MS)
    tally.count("a", GROUP, ["p"], NOW)
    tally.count("a", PROPOSAL, ["q"], NOW)
    tally.count("b", GROUP, ["p"], NOW)
    value = tally.value(NOW)
    assert value["counts"] == {"group": 5, "proposal": 1} and value["peers_known"] == 3
    assert value["first_minute"] == NOW // MINUTE_MS - 59 and len(value["minutes"]) == 60
    assert value["minutes"][-3:] == [[3, 0], [0, 0], [2, 1]] and sum(m[0] for m in value["minutes"]) == 5
    counts = {(p["run"], p["peer"]): (p["counts"]["group"], p["counts"]["proposal"]) for p in value["peers"]}
    assert counts == {("a", "p"): (3, 0), ("a", "q"): (1, 1), ("b", "p"): (1, 0)}
    first = value["curves"][0]
    assert (first["run"], first["peer"], first["groups"][-3:], first["name"]) == (
        "a",
        "p",
        [2, 0, 1],
        friendly_name("p"),
    )
    later = tally.value(NOW + 59 * MINUTE_MS)
    assert later["minutes"][0] == [2, 1] and sum(m[0] for m in later["minutes"]) == 2
    assert not any(m[0] for m in tally.value(NOW + 60 * MINUTE_MS)["minutes"])


def test_what_payloads_claim():
    tally = Tally(NOW)
    tally.read("a", GROUP, "p", 4, group(number=6), NOW - MINUTE_MS)
    tally.read("a", GROUP, "p", 5, group(number=9, ended=(True, True, False)), NOW)
    tally.read("a", PROPOSAL, "q", 6, proposal_payload(task("Another.", level=5)), NOW)
    tally.read("a", GROUP, "q", 7, b"\xff rubbish", NOW)
    value = tally.value(NOW)
    p, q = sorted(value["peers"], key=lambda row: row["peer"])
    assert (p["round"], p["policy"], p["ended"], p["read"], p["refused"]) == (9, "ab" * 6, 3 / 5, 2, 0)
    assert (q["round"], q["policy"], q["ended"], q["read"], q["refused"], q["reason"]) == (
        None, None, None, 2, 1, "not_utf8",
    )  # fmt: skip
    assert value["counts"]["group"] == 0  # reading is not counting
    latest = [(t["sequence"], t["level"], t["kind"], t["tests"], t["reason"]) for t in value["tasks"]]
    assert latest == [(7, None, "group", None, "not_utf8"), (6, 5, "proposal", 2, ""), (5, 2, "group", 2, "")]


def test_a_proposal_that_is_answered_stays_one():
    tally = Tally(NOW)
    tally.read("a", PROPOSAL, "q", 1, proposal_payload(task()), NOW)
    tally.read("a", GROUP, "p", 2, group(), NOW)
    (only,) = tally.value(NOW)["tasks"]
    assert (only["kind"], only["peer"], only["sequence"]) == (PROPOSAL, "q", 2)


def test_memory_is_bounded():
    tally = Tally(NOW)
    for i in range(600):
        at = NOW + i * MINUTE_MS
        tally.count("a", GROUP, [f"p{i}", "same"], at)
        tally.read("a", GROUP, "same", i, group(f"{i} " + "x" * 5000, number=i), at)
    value = tally.value(at)
    assert value["peers_known"] == watch.PEERS and len(value["peers"]) == watch.PEERS_SHOWN
    assert len(value["tasks"]) == watch.TASKS and len(value["curves"]) == watch.CHARTED
    assert len(tally._minutes) == watch.MINUTES and len(tally._peers["a", "same"].groups) == watch.MINUTES
    assert len(tally._peers["a", "same"].rounds) == watch.MINUTES
    assert len(encoded(value)) < 64 << 10


def test_a_peer_keeps_its_colour():
    tally = Tally(NOW)
    slots = []
    for counts in ({"p": 5, "q": 1}, {"q": 9}, {f"r{i}": 20 for i in range(6)}, {"q": 30}):
        for name, number in counts.items():
            tally.count("a", GROUP, [name] * number, NOW)
        slots.append({c["peer"]: c["slot"] for c in tally.value(NOW)["curves"]})
    assert slots[0] == slots[1] == {"p": 0, "q": 1} and slots[2]["q"] == slots[3]["q"] == 1
    assert "p" not in slots[2] and sorted(slots[3].values()) == list(range(watch.CHARTED))


def test_hostile_text_is_cut_and_visible():
    tally = Tally(NOW)
    tally.read("a", GROUP, "p", 1, group(HOSTILE), NOW)
    large = json.dumps({"task": {"question": "<b>" + "y" * 100_000 + "\0"}}).encode()
    tally.read("a", PROPOSAL, "p", 2, large, NOW)
    tally.read("a", PROPOSAL, "p", 3, b'{"task": {"question": ["\\ud800"]}}', NOW)
    tally.read("a", PROPOSAL, "p", 4, b'{"task": {"question": "\\ud800\\u0000"}}', NOW)
    tally.read("a", PROPOSAL, "p", 5, b"[" * 100_000, NOW)
    sent = encoded(tally.value(NOW))
    assert not set(b"<>&\n\x07\x1b") & set(sent) and len(sent) < 10_000
    by_sequence = {t["sequence"]: t for t in json.loads(sent)["tasks"]}
    assert by_sequence[1]["question"] == visible(HOSTILE) and by_sequence[1]["reason"] == ""
    assert len(by_sequence[2]["question"]) == watch.QUESTION and by_sequence[2]["more"] == 100_004 - watch.QUESTION
    assert by_sequence[2]["reason"] == "fields" and by_sequence[4]["question"] == "<U+D800><U+0000>"
    assert by_sequence[5]["reason"] == "too_deep" and by_sequence[5]["question"] == ""


def test_what_does_not_print_is_shown_as_its_code_point():
    assert visible("a\r\nb\tc\x00\u202e\u2028é漢") == "a\nb\tc<U+0000><U+202E><U+2028>é漢"


# ---- following the log


def filled(store, run, count, kind=GROUP, start=0, payload=None, peer="p"):
    identity = new_identity()
    items = []
    for i in range(start, start + count):
        data = group(f"{i}", number=i) if payload is None else payload
        envelope = seal(identity, run, kind, i + 1, NOW, data).SerializeToString()
        items.append(Item(kind, f"{peer}{i % 2}", i + 1, os.urandom(32), envelope))
    store.append([(run, items)], NOW)


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    made = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "data")
    yield made
    made.close()


def test_the_watcher_counts_every_entry_once_and_reads_the_newest(store):
    filled(store, "a", 5)
    watcher = Watcher(store, lambda state: None, dict, now_ms=lambda: NOW)
    watcher.look(counting=False)
    assert watcher.tally.counts == Counter() and len(watcher.tally.value(NOW)["tasks"]) == 5
    filled(store, "a", 100, start=5)
    filled(store, "b", 3, kind=PROPOSAL)
    watcher.look(), watcher.look()
    value = watcher.tally.value(NOW)
    assert value["counts"] == {"group": 100, "proposal": 3} and value["uncounted"] == 0
    assert sum(p["counts"]["group"] for p in value["peers"]) == 100
    assert sum(p["read"] for p in value["peers"]) == 5 + watch.READ_WHOLE + 3
    assert {p["round"] for p in value["peers"] if p["run"] == "a"} == {103, 104}


def test_a_look_is_bounded_and_says_what_it_passed_over(store, monkeypatch):
    monkeypatch.setattr(watch, "WINDOW", 10)
    watcher = Watcher(store, lambda state: None, dict, now_ms=lambda: NOW)
    filled(store, "a", 25)
    watcher.look()
    assert watcher.tally.counts[GROUP] == 10 and watcher.tally.uncounted == 15
    monkeypatch.setattr(watch, "LOOK_SECONDS", -1.0)
    read = watcher.tally.value(NOW)["peers"][0]["read"]
    filled(store, "a", 8, start=25)
    watcher.look()
    assert watcher.tally.counts[GROUP] == 18 and watcher.tally.value(NOW)["peers"][0]["read"] <= read + 1


def test_the_watcher_survives_retention_a_new_log_and_a_broken_store(store, monkeypatch):
    told = []
    watcher = Watcher(store, told.append, lambda: {"serving": True}, now_ms=lambda: NOW)
    filled(store, "a", 10)
    watcher.look()
    store.prune(NOW + 1, 0)
    watcher.look()
    filled(store, "a", 2, start=10)
    watcher.look()
    assert watcher.tally.counts[GROUP] == 12 and watcher._runs == [("a", 11, 12, watcher._runs[0][3])]
    watcher._cursors["a", GROUP] = 10**6  # the store was begun anew
    watcher.look()
    assert watcher.tally.counts[GROUP] == 14

    def broken():
        raise StoreFailed("no")

    monkeypatch.setattr(store, "runs", broken)
    watcher._tell(watcher._looked(True))
    assert json.loads(told[-1])["health"] == {"serving": True, "readable": False}
    watcher._tell(False)
    assert len(told) == 1  # nothing new


def test_a_defect_does_not_end_the_watcher():
    class Odd(MemoryStore):
        def runs(self):
            if not failed:
                raise ValueError("a defect")
            return super().runs()

    failed, told = [], threading.Event()
    watcher = Watcher(Odd(), lambda state: told.set(), dict, failed.append)
    watcher.start()
    try:
        assert told.wait(10) and "a defect" in failed[0]
    finally:
        watcher.stop()
    assert not watcher.is_alive()


# ---- the page over HTTP


class Running:
    """A relay with a page; `limits` replace the page's."""

    def __init__(self, monkeypatch=None, limits=None, **settings):
        self.said = []
        if limits is not None:
            monkeypatch.setattr(room, "PageLimits", lambda: limits)
        chosen = RelayOptions("127.0.0.1:0", page="127.0.0.1:0", **settings)
        self._thread = RelayThread(chosen, lambda event, **fields: self.said.append((event, fields)))

    def __enter__(self):
        self._thread.__enter__()
        self.relay = self._thread.relay
        self.address = self.relay.page_address
        self._channel = grpc.insecure_channel(self._thread.address)
        self._stub, self.me, self._number = RelayStub(self._channel), new_identity(), time.time_ns() // 1000
        return self

    def __exit__(self, *exc):
        self._channel.close()
        self._thread.__exit__(*exc)

    def publish(self, *payloads, kind=GROUP, run="a"):
        envelopes = []
        for payload in payloads:
            self._number += 1
            envelopes.append(seal(self.me, run, kind, self._number, int(time.time() * 1000), payload))
        return self._stub.Publish(PublishRequest(run=run, envelopes=envelopes), timeout=20)

    def connect(self):
        host, port = self.address.split(":")
        return socket.create_connection((host, int(port)), timeout=20)

    def ask(self, path="/", method="GET", **headers):
        connection = http.client.HTTPConnection(self.address, timeout=20)
        try:
            connection.request(method, path, headers=headers)
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def state(self, until=lambda state: True):
        end = time.monotonic() + 20
        while True:
            state = json.loads(self.ask("/state.json")[2])
            if state and until(state):
                return state
            assert time.monotonic() < end, state
            time.sleep(0.05)


@pytest.fixture(scope="module")
def running():
    with Running() as made:
        yield made


class Events:
    """The states that an event stream brings."""

    def __init__(self, address):
        self._connection = http.client.HTTPConnection(address, timeout=20)
        self._connection.request("GET", "/events")
        self.reply = self._connection.getresponse()

    def next(self):
        while True:
            line = self.reply.readline()
            assert line, "the stream ended"
            if line.startswith(b"data: "):
                return json.loads(line[6:])

    def close(self):
        self.reply.close()
        self._connection.close()


def test_headers_of_every_answer(running):
    for path, method, status in (
        ("/", "GET", 200), ("/", "HEAD", 200), ("/state.json", "GET", 200), ("/?x=1", "GET", 200), ("/no", "GET", 404),
        ("/../etc/passwd", "GET", 404), ("/%2e%2e/page.py", "GET", 404), ("/", "POST", 405), ("/events", "DELETE", 405),
    ):  # fmt: skip
        got, headers, body = running.ask(path, method)
        assert got == status, path
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"]) and "unsafe" not in str(policy)
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
        assert headers["cache-control"] == "no-store" and "server" not in headers
        assert (body == b"") == (method == "HEAD") and "access-control-allow-origin" not in headers
    assert running.ask("/", "PUT")[1]["allow"] == "GET, HEAD"


def test_the_page_is_one_small_file_of_our_own(running):
    _, headers, html = running.ask("/")
    assert headers["content-type"] == "text/html; charset=utf-8"
    source = (ROOT / "cz_jax" / "swarm" / room.FILE).read_text("utf-8")
    assert source.count("\n") < 500
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "http:",
        "https:",
        "onclick",
    ):
        assert forbidden not in source.replace("http://www.w3.org/2000/svg", "")
    assert len(re.findall(rb"<script", html)) == 2 and b" style=" not in html


def test_another_site_cannot_read_through_the_browser(running):
    assert running.ask("/", Host="evil.example")[0] == 421
    assert running.ask("/state.json", Host="evil.example:80")[0] == 421
    assert running.ask("/", Host="localhost:9999")[0] == 200  # through ssh -L


def test_an_update_comes_after_a_publish(running):
    events = Events(running.address)
    try:
        assert events.reply.getheader("content-type").startswith("text/event-stream")
        before = events.next()["counts"]["group"]
        running.publish(group("An update."), group("Another update."))
        state = events.next()
        while state["counts"]["group"] < before + 2:
            state = events.next()
        assert state["counts"]["group"] == before + 2 and state["tasks"][0]["question"] == "Another update."
        (row,) = [p for p in state["peers"] if p["peer"] == running.me.peer_id]
        assert row["name"] == running.me.name and row["round"] == 7
        assert state["runs"][0]["head"] == before + 2 and state["runs"][0]["bytes"] > 0
        health = state["health"]
        assert health["serving"] and health["readable"] and health["retain_hours"] == 24.0
    finally:
        events.close()


def test_viewers_cost_the_store_nothing(running):
    running.publish(group())
    running.state(lambda s: s["counts"]["group"])
    time.sleep(2 * watch.PAUSE_SECONDS)
    store, asked = running.relay.log.store, []
    for name in ("read", "scan", "page"):
        whole = getattr(store, name)
        setattr(store, name, lambda *a, whole=whole, name=name: (asked.append(name), whole(*a))[1])
    for _ in range(20):
        running.ask("/"), running.ask("/state.json")
    streams = [Events(running.address) for _ in range(5)]
    assert all(stream.next()["counts"] for stream in streams) and asked == []
    for stream in streams:
        stream.close()


def test_gone_viewers_are_forgotten(running):
    streams = [Events(running.address) for _ in range(3)]
    for stream in streams:
        stream.next()
    assert running.relay._page.viewers >= 3
    for stream in streams:
        stream.close()
    end = time.monotonic() + 10
    while running.relay._page.viewers:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_limits(monkeypatch):
    limits = PageLimits(connections=6, viewers=2, request_seconds=0.6, take_seconds=0.6, stream_seconds=60)
    with Running(monkeypatch, limits) as r:
        idle = [r.connect() for _ in range(6)]
        with r.connect() as late:  # one too many
            assert ended(late)
        begun = time.monotonic()
        assert all(ended(c) for c in idle) and time.monotonic() - begun < 10
        with r.connect() as slow:  # a request line that never ends
            begun = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() - begun < 10:
                    slow.sendall(b"x")
                    time.sleep(0.1)
        streams = [Events(r.address) for _ in range(2)]
        status, headers, _ = r.ask("/events")
        assert status == 503 and headers["retry-after"] == "30" and r.ask("/")[0] == 200
        for stream in streams:
            stream.close()


def ended(connection):
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
        b"rubbish\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ],
    ids=["long line", "long header", "tls", "no host", "rubbish", "length"],
)
def test_bad_requests(running, capfd, request_bytes):
    with running.connect() as connection:
        connection.sendall(request_bytes)
        reply = b""
        try:
            while chunk := connection.recv(4096):
                reply += chunk
        except ConnectionResetError:
            pass
    assert re.match(rb"HTTP/1.1 4(00|31) ", reply)
    assert running.ask("/")[0] == 200 and capfd.readouterr().err == ""


def test_rubbish_behind_a_request(running, capfd):
    with running.connect() as connection:
        connection.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert connection.recv(10) == b"HTTP/1.1 2"
        with pytest.raises(OSError):
            for _ in range(200):
                connection.sendall(os.urandom(500))
                time.sleep(0.02)
    with running.connect() as connection:  # a body that nobody wants
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n" + b"z" * 1000)
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert running.ask("/")[0] == 200 and capfd.readouterr().err == ""


def test_a_viewer_that_never_reads_is_cut(monkeypatch):
    with Running(monkeypatch, PageLimits(take_seconds=0.5)) as r:
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = r.address.split(":")
        stuck.connect((host, int(port)))
        stuck.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        end = time.monotonic() + 20
        while not r.relay._page.viewers:
            time.sleep(0.01)
        for i in range(100_000):
            r.relay._page.tell(b'{"time_ms":%d,"filler":"%s"}' % (i, b"x" * 20_000))
            if not r.relay._page.viewers:
                break
            assert time.monotonic() < end
            time.sleep(0.01)
        assert r.ask("/state.json")[0] == 200
        stuck.close()


def test_a_defect_while_serving_is_told_and_costs_one_answer(monkeypatch, capfd):
    with Running() as r:
        monkeypatch.setattr(r.relay._page, "_whole", None)
        assert r.ask("/")[0] == 500
        assert [f["detail"] for e, f in r.said if e == "page_failed"] and capfd.readouterr().err == ""
        monkeypatch.undo()
        assert r.ask("/")[0] == 200


def test_the_relay_ends_soon_with_viewers_there(monkeypatch):
    with Running() as r:
        streams, idle = [Events(r.address) for _ in range(4)], r.connect()
        for stream in streams:
            stream.next()
        begun = time.monotonic()
    assert time.monotonic() - begun < 6 and r.said[-1] == ("stopped", {"whole": True})
    for stream in streams:
        stream.reply.read()  # whole: it was ended, not cut
        stream.close()
    idle.close()
    with pytest.raises(OSError):
        r.connect()


def test_the_start_event_says_where_it_is(running):
    fields = dict(running.said)["serving"]
    port = running.address.rpartition(":")[2]
    assert fields["page"] == f"http://127.0.0.1:{port}/"
    assert fields["ssh"] == f"ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}"


def test_where_it_may_listen(running):
    def start(page, **more):
        with RelayThread(RelayOptions("127.0.0.1:0", page=page, **more)) as thread:
            return thread.relay

    with pytest.raises(RelayError, match="--page 0.0.0.0 is not loopback.*--insecure"):
        start("0.0.0.0:0")
    with pytest.raises(RelayError, match="--page 'x' is not HOST:PORT"):
        start("x")
    with pytest.raises(RelayError, match="cannot be listened on: .*--page HOST:0"):
        start(running.address)
    assert start("0.0.0.0:0", insecure=True)._page_lines().keys() == {"page"}


def test_no_page_unless_asked_for():
    with RelayThread(RelayOptions("127.0.0.1:0")) as thread:
        assert thread.relay._page is None and thread.relay._watcher is None and thread.relay.page_address == ""


def test_metrics_stand_beside_it():
    with Running(metrics="127.0.0.1:0") as r:
        r.publish(group())
        connection = http.client.HTTPConnection(r.relay.metrics_address, timeout=20)
        connection.request("GET", "/metrics")
        assert b"cz_relay_published_total" in connection.getresponse().read()
        connection.close()


def test_state_from_any_thread_after_the_loop_has_ended():
    async def made():
        return PageServer(None, lambda text: None)

    asyncio.run(made()).tell(b"{}")


# ---- in a browser


def test_in_a_browser_hostile_text_is_text(browser, tmp_path):
    with Running() as r:
        r.publish(group(HOSTILE), group("x" * 6000), group("A fair task."))
        large = json.dumps({"task": {"question": "<script>document.title='pwned'</script>" + "y" * 100_000}}).encode()
        r.publish(large, kind=PROPOSAL)
        r.state(lambda s: s["counts"] == {"group": 3, "proposal": 1} and len(s["tasks"]) == 4)
        told = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom",
             f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--log-level=0", "--timeout=2000",
             f"http://{r.address}/"], capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert told.returncode == 0 and "CONSOLE" not in told.stderr
    page = told.stdout
    assert "<title>CodeZero relay</title>" in page  # no script of theirs ran
    tasks = page[page.index('<div id="tasks">') : page.index("<h2>Storage")]
    assert tasks.count("<article") == 4 and "A fair task." in tasks and r.me.name in tasks
    assert "&lt;/script&gt;&lt;script&gt;document.title" in tasks and "&lt;U+202E&gt;" in tasks
    assert not re.search(r"<(?!/?(div|article|p|span|pre|section|h2)\b)", tasks.split("</section>")[0])
    assert len(re.findall("<script", page)) == 2 and "<img" not in page and "99,4" in tasks
    assert "Serving" in page and "<rect" in page and "<table" in page
