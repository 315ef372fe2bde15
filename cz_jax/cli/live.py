"""The view of a swarm on this machine: a table of its processes that lives on a terminal, plain lines elsewhere."""

import time

from cz_jax.cli.show import Progress, brief, duration, evaluation_line, round_line

BARS = "▁▂▃▄▅▆▇█"
HISTORY = 24  # rounds of a reward curve
PARTS = ("reward_structure", "reward_format", "reward_correctness")


class SwarmProgress(Progress):
    """A Progress whose events may carry `source`, the process that tells of itself.

    On a terminal each process is a row: its round, the reward and its parts, success, level, average@k before, tokens a
    second, what came from peers, and what it does at the moment. Elsewhere a line a round, named after its process.
    """

    def __init__(self, stream=None, live: bool | None = None, now=time.monotonic):
        self._rows: dict[str, dict] = {}
        super().__init__(stream, live, now)

    def __call__(self, event: str, **fields) -> None:
        source = fields.pop("source", None)
        if source is None:
            return super().__call__(event, **fields)
        with self._lock:
            row = self._rows.setdefault(source, {"history": [], "doing": "", "since": self._now(), "before": None})
            if event == "phase":
                row |= {"doing": str(fields.get("name", "")), "since": self._now()}
            elif event == "round":
                row |= {"round": fields, "doing": "", "since": self._now()}
                reward = fields["metrics"].get("reward")
                row["history"] += [reward] if reward is not None else []
                row["peers"] = row.get("peers", 0) + fields["metrics"].get("groups_external", 0)
                if self._live is None and source != "proposer":
                    self._print(f"{source}  {round_line(fields['number'], fields['of'], fields['metrics'])}")
            elif event == "evaluated":
                row[fields["when"]] = fields["average_at_k"]
                self._print(f"{source}  {evaluation_line(fields)}")
            elif event == "note":
                self._print(f"{source}  {fields.get('text', '')}")
            self._phase, self._phase_begun = self._doing(), self._now()
        return None

    def tick(self) -> None:
        with self._lock:
            if self._live is not None and self._rows:
                self._live.update(self._table())
            else:
                super().tick()

    def _doing(self) -> str:
        now = self._now()
        busy = [
            f"{name} {row['doing']} {duration(now - row['since'])}" for name, row in self._rows.items() if row["doing"]
        ]
        return "; ".join(busy)

    def _phase_text(self, lasted: float) -> str:
        return self._doing() if self._rows else super()._phase_text(lasted)

    def _table(self):
        from rich.table import Table

        table = Table(
            box=None, padding=(0, 1), title=f"CodeZero, {duration(self._now() - self._begun)}", title_justify="left"
        )
        heads = (
            "",
            "round",
            "reward",
            "",
            "structure",
            "format",
            "correct",
            "level",
            "avg@k",
            "tok/s",
            "peers'",
            "now",
        )
        for head in heads:
            table.add_column(head, justify="left" if head in ("", "now") else "right", no_wrap=True)
        for name, row in self._rows.items():
            table.add_row(*self._cells(name, row))
        return table

    def _cells(self, name: str, row: dict) -> list[str]:
        told = row.get("round", {"number": 0, "of": None, "metrics": {}})
        metrics, of = told["metrics"], told["of"]
        known = [
            brief(metrics[key]) if key in metrics else "" for key in ("reward", *PARTS, "level", "tokens_per_second")
        ]
        reward, structure, form, correct, level, speed = known
        scores = [row[when]["value"] for when in ("before", "after") if row.get(when)]
        return [
            name, f"{told['number']}/{of}" if of else str(told["number"]), reward, curve(row["history"][-HISTORY:]),
            structure, form, correct, level, " → ".join(f"{score:.0%}" for score in scores), speed,
            str(row.get("peers", "")), row["doing"],
        ]  # fmt: skip


def curve(values: list[float]) -> str:
    """`values` as a row of bars between their least and their greatest."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    return "".join(BARS[int((v - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for v in values)
