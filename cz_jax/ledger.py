"""The run folder's record of what happened: a line a round in metrics.jsonl, the whole Round in rounds/, summary.json.

A metric that is NaN or infinite is written as null, "there is no such number"; anywhere else in a Round it is refused.
Every file is strict JSON, and what `write` has returned from survives a power cut.
"""

import gzip
import json
import logging
import math
import os
import pathlib
import re
import zlib
from collections.abc import Iterator

from cz_jax.errors import CheckpointError, one_line
from cz_jax.files import sync_folder, write_atomic
from cz_jax.nouns import Round, canonical_json, from_json, to_json

METRICS, ROUNDS, SUMMARY = "metrics.jsonl", "rounds", "summary.json"
MAX_ROUND_BYTES = 1 << 30
RECORD = re.compile(r"(\d{6,})\.json\.gz")

log = logging.getLogger(__name__)


class RunLedger:
    """The ledger of the run in `folder`; implements `ports.Ledger`. One writer a folder: the trainer that holds the
    checkpoints' lock. Reading changes nothing and needs no lock."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        self.metrics_path = self.folder / METRICS
        self.rounds_path = self.folder / ROUNDS
        self._ready = False  # whether `_last` is known, and no torn line stands at the end of the file
        self._last: int | None = None

    def write(self, round_: Round) -> None:
        """Writes rounds/<number>.json.gz, then appends the line {"round": number, **metrics} to metrics.jsonl.

        CheckpointError if the disk is full (the folder is then as it was before, but for the record, which the next try
        replaces) or if the file already holds this round or a later one. ValueError for a NaN outside of the metrics.
        """
        if round_.number < 0 or round_.metrics.get("round", round_.number) != round_.number:
            raise ValueError(f"a round numbered {round_.number} with the metric round={round_.metrics.get('round')!r}")
        metrics = _without_nan(to_json(round_.metrics))
        record = canonical_json(to_json(round_) | {"metrics": metrics}).encode("ascii")
        line = canonical_json({"round": round_.number} | metrics).encode("ascii") + b"\n"
        try:
            self._prepare()
            if self._last is not None and round_.number <= self._last:
                raise CheckpointError(
                    f"{self.metrics_path} already holds round {self._last}, so round {round_.number} cannot follow",
                    "another run's folder, or a run that resumed from an older checkpoint",
                    "resume with --resume, or use another --out folder",
                )
            write_atomic(self._record_path(round_.number), gzip.compress(record, compresslevel=6, mtime=0))
            self._append(line)
        except OSError as e:
            raise _cannot_write(self.folder, f"round {round_.number}", e) from e
        self._last = round_.number

    def truncate_after(self, round_number: int) -> None:
        """Drops every line and record after `round_number`, and a torn last line: a resumed run continues there.

        CheckpointError for a damaged line among those that stay, or if the folder cannot be written to.
        """
        kept, last = 0, None
        for line, end in self._lines():
            if line["round"] <= round_number:
                kept, last = end, line["round"]
            if line["round"] >= round_number:
                break
        if last != round_number and round_number > 0:
            log.warning("%s ends at round %s, before the checkpoint's round %d", self.metrics_path, last, round_number)
        try:
            self._cut(kept)
            if self.rounds_path.is_dir():
                for path in list(self.rounds_path.iterdir()):
                    record = RECORD.fullmatch(path.name)
                    if int(record[1]) > round_number if record else path.suffix == ".tmp":
                        path.unlink()
                sync_folder(self.rounds_path)
        except OSError as e:
            raise _cannot_write(self.folder, f"what follows round {round_number}", e) from e
        self._ready = False

    def rounds(self) -> Iterator[dict]:
        """The lines of metrics.jsonl as dicts, in order. A torn last line is left out with a warning; CheckpointError
        for a damaged one before it."""
        for line, _ in self._lines():
            yield line

    def read_round(self, number: int) -> Round:
        """The whole record of a round. CheckpointError if it is missing, damaged, too large or another round's."""
        path = self._record_path(number)
        try:
            with gzip.open(path) as f:
                data = f.read(MAX_ROUND_BYTES + 1)
            if len(data) > MAX_ROUND_BYTES:
                raise CheckpointError(f"{path} unpacks to more than {MAX_ROUND_BYTES} bytes", "not a record of ours")
            round_ = from_json(Round, json.loads(data))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} does not exist", f"round {number} was not played, or it was removed"
            ) from None
        except (OSError, EOFError, zlib.error, ValueError, RecursionError) as e:
            raise CheckpointError(f"{path} is not a whole record: {e}", "a damaged file") from None
        if round_.number != number:
            raise CheckpointError(f"{path} holds round {round_.number!r}", "the file was copied or renamed")
        return round_

    def read_summary(self) -> dict | None:
        """What summary.json holds; None where there is none yet. CheckpointError for a damaged one."""
        path = self.folder / SUMMARY
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as e:
            raise CheckpointError(f"{path} cannot be read: {e}", "a damaged file") from None

    def write_summary(self, summary: dict) -> None:
        """Writes summary.json, whole or not at all; a number that is NaN or infinite becomes null. CheckpointError if
        the disk is full."""
        text = json.dumps(_without_nan(to_json(summary)), sort_keys=True, indent=2, allow_nan=False) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / SUMMARY, text.encode("ascii"))
        except OSError as e:
            raise _cannot_write(self.folder, SUMMARY, e) from e

    def _record_path(self, number: int) -> pathlib.Path:
        return self.rounds_path / f"{number:06d}.json.gz"

    def _prepare(self) -> None:
        """Once, before the first write: the folders, the last round that is there, and no torn line at the end."""
        if self._ready:
            return
        self.rounds_path.mkdir(parents=True, exist_ok=True)
        self._last, kept = None, 0
        for line, end in self._lines():
            self._last, kept = line["round"], end
        self._cut(kept)
        self._ready = True

    def _cut(self, size: int) -> None:
        if self.metrics_path.exists() and self.metrics_path.stat().st_size != size:
            with open(self.metrics_path, "r+b") as f:
                f.truncate(size)
                os.fsync(f.fileno())

    def _append(self, line: bytes) -> None:
        new = not self.metrics_path.exists()
        with open(self.metrics_path, "ab", buffering=0) as f:
            size = f.tell()
            try:
                if f.write(line) != len(line):
                    raise OSError(f"{METRICS} took only a part of the line: the disk is full")
                os.fsync(f.fileno())
            except OSError:
                f.truncate(size)
                raise
        if new:
            sync_folder(self.folder)

    def _lines(self) -> Iterator[tuple[dict, int]]:
        """(line, where it ends in the file in bytes), in order, without a torn last one."""
        if not self.metrics_path.exists():
            return
        end, last, bad = 0, -1, None
        with open(self.metrics_path, "rb") as f:
            for index, data in enumerate(f, start=1):
                if bad is not None:
                    raise CheckpointError(
                        f"{self.metrics_path} line {bad[0]} is damaged: {bad[1]}", "", "restore that line from a copy"
                    )
                try:
                    line = _parse(data, last)
                except (ValueError, RecursionError) as e:
                    bad = index, e
                    continue
                end, last = end + len(data), line["round"]
                yield line, end
        if bad is not None:
            log.warning("%s: the last line is torn and left out: %s", self.metrics_path, bad[1])


def _parse(data: bytes, last: int) -> dict:
    if not data.endswith(b"\n"):
        raise ValueError("it has no end")
    line = json.loads(data)
    number = line.get("round") if isinstance(line, dict) else None
    if type(number) is not int or number <= last:
        raise ValueError(f"its round is {number!r}, after {last}")
    return line


def _without_nan(value):
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cannot_write(folder: pathlib.Path, what: str, error: OSError) -> CheckpointError:
    reason = one_line(error.strerror or str(error))
    return CheckpointError(f"{folder}: {what} could not be written: {reason}", "a full disk, or no permission to write")
