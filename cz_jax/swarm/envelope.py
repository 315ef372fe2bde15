"""The signed message that travels, and the two things it carries: groups and proposals, as text.

An `Envelope` is signed over every field by the peer's identity; the relay and every reader check it on their own.
Payloads are JSON and hold what a receiver cannot compute: no ids, no rewards, no verdicts, no tokens. Who a group is
of follows from the key that signed it.

What this does not protect: a peer may lie about its round, its policy and whether an answer ended.
"""

import hashlib
import re
import struct
from dataclasses import dataclass

from cz_jax.nouns import Group, Level, Rollout, Task, canonical_json
from cz_jax.swarm.identity import Identity, peer_id_of, verify
from cz_jax.swarm.relay_pb2 import Envelope
from cz_jax.text.reading import BadJson, is_unicode, load_json

VERSION = 1
GROUP, PROPOSAL = "group", "proposal"
KINDS = (GROUP, PROPOSAL)
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_PAYLOAD = 256 << 10  # bytes
MAX_NUMBER = (1 << 63) - 1
MAX_TIME_MS = 253_402_300_800_000  # the year 10000

MAX_ANSWER = 32 << 10  # characters
MAX_QUESTION = 6_000
MAX_TEST = 2_000
MAX_TESTS = 20
MAX_NAME = 64
MAX_ROUND = 1 << 31
SOURCES = ("proposer", "mbpp", "code_contests", "builtin", "file")

_DOMAIN = b"cz-jax envelope\0"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Rejected(ValueError):
    """A message that is not taken. `reason`: a short stable snake_case code, fit to be counted; `detail`: which field,
    and its limit."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass(frozen=True, slots=True)
class Opened:
    """An envelope whose signature holds. `hash`: 32 bytes that stand for its content, whenever it was signed."""

    peer: str
    run: str
    kind: str
    number: int
    time_ms: int
    payload: bytes
    hash: bytes


def seal(identity: Identity, run: str, kind: str, number: int, time_ms: int, payload: bytes) -> Envelope:
    """The signed envelope of `payload`; `number` must be higher than that of any other message of this identity."""
    envelope = Envelope(
        version=VERSION, run=run, kind=kind, number=number, time_ms=time_ms, payload=payload,
        public_key=identity.public_bytes,
    )  # fmt: skip
    envelope.signature = identity.sign(_signed_bytes(envelope))
    return envelope


def open_envelope(envelope: Envelope, run: str, kind: str | None = None) -> Opened:
    """What `envelope` holds, checked: Rejected unless it is of this major version, of `run` (and `kind`, where given),
    within the limits, and signed by the key it names."""
    if envelope.version != VERSION:
        raise Rejected("version", f"envelope version {envelope.version}, this relay and node speak {VERSION}")
    if not RUN.fullmatch(envelope.run):
        raise Rejected("run_name", "a run is named with 1 to 64 letters, digits, dots, dashes or underscores")
    if envelope.run != run:
        raise Rejected("other_run", f"the envelope is of run {envelope.run}, not of {run}")
    if envelope.kind not in KINDS or kind not in (None, envelope.kind):
        raise Rejected("kind", f"wanted: {kind or ' or '.join(KINDS)}")
    if not 1 <= envelope.number <= MAX_NUMBER:
        raise Rejected("number", f"the peer's sequence is from 1 to {MAX_NUMBER}")
    if not 0 < envelope.time_ms < MAX_TIME_MS:
        raise Rejected("time", "time_ms is milliseconds since 1970")
    if not 1 <= len(envelope.payload) <= MAX_PAYLOAD:
        raise Rejected("payload_size", f"payload of {len(envelope.payload)} bytes, from 1 to {MAX_PAYLOAD} are allowed")
    try:
        peer = peer_id_of(envelope.public_key)
    except ValueError as e:
        raise Rejected("public_key", str(e)) from None
    if not verify(envelope.public_key, _signed_bytes(envelope), envelope.signature):
        raise Rejected("signature", "the signature is not of this key over this message")
    e = envelope
    return Opened(peer, e.run, e.kind, e.number, e.time_ms, e.payload, content_hash(e))


def content_hash(envelope: Envelope) -> bytes:
    """SHA-256 of run, kind, signer and payload: the same content signed once more is the same content."""
    texts = (envelope.run.encode(), envelope.kind.encode(), envelope.public_key, envelope.payload)
    return hashlib.sha256(b"".join(struct.pack(">I", len(t)) + t for t in texts)).digest()


def _signed_bytes(envelope: Envelope) -> bytes:
    """One spelling of all signed fields: protobuf's own is not unique."""
    e = envelope
    head = _DOMAIN + struct.pack(">IQq", e.version, e.number, e.time_ms)
    texts = (e.run.encode(), e.kind.encode(), e.public_key, e.payload)
    return head + b"".join(struct.pack(">I", len(t)) + t for t in texts)


def group_payload(group: Group) -> bytes:
    """The text of `group` as its peers get it."""
    value = {
        "task": _task_value(group.task),
        "policy": group.policy,
        "round": group.round,
        "rollouts": [{"text": r.text, "ended": r.ended} for r in group.rollouts],
    }
    return canonical_json(value).encode("ascii")


def read_group(payload: bytes, peer: str, group_size: int | None) -> Group:
    """The group in `payload`, which `peer` signed; Rejected for anything else, and for another number of answers than
    `group_size`: groups of one update have one shape. None takes any number."""
    value = _fields(_json(payload), {"task", "policy", "round", "rollouts"}, "group")
    task = _task(value["task"])
    if not isinstance(value["policy"], str) or not _DIGEST.fullmatch(value["policy"]):
        raise Rejected("policy", "policy is a SHA-256 in hex")
    _whole(value["round"], 0, MAX_ROUND, "round")
    rollouts = value["rollouts"]
    if not isinstance(rollouts, list) or group_size not in (None, len(rollouts)):
        raise Rejected("group_size", f"round.group_size={group_size} answers are wanted")
    return Group(task, peer, value["policy"], value["round"], tuple(_rollout(r) for r in rollouts))


def proposal_payload(task: Task) -> bytes:
    """A proposed task as solvers get it."""
    return canonical_json({"task": _task_value(task)}).encode("ascii")


def read_proposal(payload: bytes) -> Task:
    """The task in `payload`; Rejected for anything else. Whether it is a good one is for the caller to judge."""
    return _task(_fields(_json(payload), {"task"}, "proposal")["task"])


def answers_key(group: Group) -> str:
    """What the answers say, whoever says it: equal for a group and a copy of it under another name or policy."""
    answers = sorted(r.text for r in group.rollouts)
    return hashlib.sha256(canonical_json([group.task.id, answers]).encode("ascii")).hexdigest()[:32]


def _task_value(task: Task) -> dict:
    return {
        "source": task.source,
        "question": task.question,
        "tests": list(task.tests),
        "entry_point": task.entry_point,
        "level": task.level,
    }


def _json(payload: bytes):
    if len(payload) > MAX_PAYLOAD:
        raise Rejected("payload_size", f"at most {MAX_PAYLOAD} bytes")
    try:
        return load_json(payload.decode("utf-8"))
    except UnicodeDecodeError:
        raise Rejected("not_utf8", "payload") from None
    except BadJson as e:
        raise Rejected(e.reason, "payload") from None


def _task(value) -> Task:
    value = _fields(value, {"source", "question", "tests", "entry_point", "level"}, "task")
    if value["source"] not in SOURCES:
        raise Rejected("source", f"task.source is one of {', '.join(SOURCES)}")
    question = _text(value["question"], MAX_QUESTION, "task.question")
    tests = value["tests"]
    if not isinstance(tests, list) or not 1 <= len(tests) <= MAX_TESTS:
        raise Rejected("tests", f"task.tests holds 1 to {MAX_TESTS} texts")
    tests = tuple(_text(t, MAX_TEST, "task.tests") for t in tests)
    entry = value["entry_point"]
    if entry is not None and not _text(entry, MAX_NAME, "task.entry_point").isidentifier():
        raise Rejected("entry_point", "task.entry_point is a name")
    _whole(value["level"], 1, 5, "task.level")
    return Task(value["source"], question, tests, entry, Level(value["level"]))


def _rollout(value) -> Rollout:
    value = _fields(value, {"text", "ended"}, "rollout")
    if not isinstance(value["ended"], bool):
        raise Rejected("ended", "rollout.ended is true or false")
    return Rollout(_text(value["text"], MAX_ANSWER, "rollout.text", least=0), value["ended"])


def _fields(value, names: set[str], what: str) -> dict:
    if not isinstance(value, dict) or set(value) != names:
        raise Rejected("fields", f"a {what} has exactly {', '.join(sorted(names))}")
    return value


def _text(value, most: int, name: str, least: int = 1) -> str:
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise Rejected("text", f"{name} is a text of {least} to {most} characters")
    if not is_unicode(value):
        raise Rejected("characters", f"{name} holds a NUL or a lone surrogate")
    return value


def _whole(value, least: int, most: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Rejected("number_range", f"{name} is a whole number from {least} to {most}")
