"""train, evaluate_model, judge_model: what the command line calls, as functions."""

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import fmean

import jax

from cz_jax.build.models import CHECKPOINTS, CONFIG, checkpoints_of, export_run, load_model, write_texts
from cz_jax.build.node import Built, build, mesh_of, prepare, spread
from cz_jax.build.worker import run_interruptibly
from cz_jax.checkpoint import Checkpoints, held
from cz_jax.config import Config, changed_keys, from_dict, to_toml
from cz_jax.difficulty import LevelState
from cz_jax.errors import CheckpointError, ConfigError, Preempted, TaskError
from cz_jax.evaluate import evaluate
from cz_jax.files import is_taken, local_folder, write_atomic
from cz_jax.ledger import RunLedger
from cz_jax.loop import Position, run
from cz_jax.metrics import gain_estimate, judge_quality
from cz_jax.nouns import Outcome, Round, Task
from cz_jax.parallel import any_process, is_primary, process_0_says, wait_for_all
from cz_jax.preemption import sigterm_preempts
from cz_jax.report import REPORT, Sinks, load_sinks, write_report
from cz_jax.roles.evaluator import ModelEvaluator
from cz_jax.roles.learner import state_target
from cz_jax.roles.solver import ModelSolver
from cz_jax.tasks import load_tasks
from cz_jax.timeline import Recorder

EVALUATIONS = "evaluations.json"
PAIRS_AT_ONCE = 64
MACHINE_KEYS = ("run.compile_cache", "run.gpu_memory")
RELAY_KEYS = tuple(f"swarm.{key}" for key in ("relay", "tls", "tls_ca", "insecure", "fetch_seconds", "buffer"))


def quiet(event: str, **fields) -> None:
    """A progress callback that says nothing."""


def train(config: Config, out, resume: bool = False, say: Callable = quiet, trace: int | None = None) -> dict:
    """Plays the rounds of `config` in the run folder `out` and returns its summary.

    The folder gets config.toml, model/, checkpoints/, metrics.jsonl, rounds/, evaluations.json, export/,
    summary.json and report.html. With `resume` the run in the folder goes on exactly where its newest whole checkpoint
    stands. Of several processes, number 0 alone reads and writes the folder, and its `resume` counts; where they do not
    share a disk, `checkpoint.folder` names a place for the checkpoints that all of them reach. `trace` (1: the first):
    which of the rounds that are played now is recorded into `out`/trace. UserError for bad input.
    KeyboardInterrupt (Preempted for SIGTERM) is passed on after saving the last finished round.
    """
    out = local_folder(out)
    settings = prepare(config.run)
    primary = is_primary()
    say = say if primary else quiet
    resume = _checked(out, resume)
    if jax.devices()[0].platform == "gpu":
        say("note", text=settings)
    trackers = load_sinks(config.report.sinks) if primary else {}
    wait_for_all("the run folder")
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        alone = jax.process_count() == 1
        preempted = stack.enter_context(sigterm_preempts(raising=alone))
        if trace is not None and primary:
            say = stack.enter_context(Recorder(say, out, trace))
        built = stack.enter_context(
            contextlib.closing(build(config, say, out))
        )  # first: what fails here leaves nothing
        if primary and config.checkpoint.folder:
            stack.enter_context(held(out / CHECKPOINTS))  # the ledger is this trainer's, wherever the checkpoints are
        place, keeps = checkpoints_of(out, config), config.checkpoint
        checkpoints = stack.enter_context(Checkpoints(place, keep=keeps.keep, keep_best=keeps.keep_best))
        ledger = RunLedger(out)
        keeper = Keeper(built, ledger if primary else None, checkpoints)
        begun = process_0_says(next(ledger.rounds(), None) is not None)
        if resume and (begun or checkpoints.latest() is not None):
            position = _resume(built, checkpoints, ledger, out)
            keeper.saved = position.number
        else:
            position = _begin(built, keeper, out, say)
        keeper.sinks = sinks = Sinks(trackers, out, config.model_dump(mode="json"), position.number, say)
        try:
            work = functools.partial(_play, built, position, keeper, out)
            stops = None if alone else (lambda: any_process(preempted()))  # several stop at the same phase
            after = run_interruptibly(work, say, keeper.is_whole, stops)
        except KeyboardInterrupt as e:
            keeper.save_interrupted(e)
            sinks.close(1.0)
            raise
        finally:
            keeper.report(say)
            sinks.close()
        checkpoints.wait()
        summary = _finish(built, ledger, out, started, after, say) if primary else {}
        keeper.report(say)
    say("done", summary=summary)
    return summary


def _play(built: Built, position: Position, keeper: "Keeper", out: pathlib.Path, say) -> dict | None:
    """The evaluation before, unless it is there, the rounds, and the result of the evaluation after."""
    evaluates = built.node.config.eval.before_and_after
    if evaluates and position.number == 0 and not process_0_says((out / EVALUATIONS).exists()):
        _write_evaluations(out, {"before": _evaluate(built, "before", say)})
    run(built.node, position, keeper, say)
    return _evaluate(built, "after", say) if evaluates else None


class Keeper:
    """Writes rounds down, saves every checkpoint.every of them and the last, and knows what to save on an interrupt.

    `ledger` is None where another process of the run writes.
    """

    def __init__(self, built: Built, ledger: RunLedger | None, checkpoints: Checkpoints):
        self._built, self._ledger, self._checkpoints = built, ledger, checkpoints
        self._last: tuple[int, dict, float | None, object] | None = None  # round, host state, score, train state
        self.saved: int | None = None
        self.sinks: Sinks | None = None  # trackers that get a copy of every round's metrics

    def __call__(self, round_: Round, position: Position) -> None:
        if self._ledger is not None:
            self._ledger.write(round_)
        self.mark(position, round_.metrics.get("reward"))
        if self.sinks is not None:
            self.sinks.write(position.number, round_.metrics)
        config = self._built.node.config
        if position.number % config.checkpoint.every == 0 or position.number == config.run.rounds:
            self.save()
            self.report(quiet)

    def mark(self, position: Position, score: float | None = None) -> None:
        """From here on an interrupt saves this position."""
        self._last = (position.number, self._built.host_state(position), score, self._built.learner.state)

    def save(self) -> None:
        number, host, score, state = self._last
        self._checkpoints.save(number, state, host, score)
        self.saved = number

    def report(self, say: Callable) -> None:
        """Writes report.html as things stand. A full disk that stops the page does not stop the run."""
        if self._ledger is not None:
            try:
                write_report(self._ledger.folder)
            except OSError as e:
                say("note", text=f"{REPORT} could not be written: {e.strerror or e}")

    def is_whole(self) -> bool:
        """Whether the parameters of the last finished round are still there: an update takes them apart."""
        return self._last is not None and not any(a.is_deleted() for a in jax.tree.leaves(self._last[3]))

    def save_interrupted(self, interrupt: KeyboardInterrupt) -> None:
        """Saves the last finished round where an update has not yet taken its parameters apart; otherwise the
        checkpoint before it continues the run just as exactly. So it does where Ctrl-C reaches several processes, which
        are then at different moments; Preempted finds all of them at the same one. An update that was still being
        compiled may begin while its parameters are saved: the save is then given up like one that came too late."""
        together = jax.process_count() == 1 or isinstance(interrupt, Preempted)
        if together and self._last is not None and self._last[0] != self.saved and self.is_whole():
            try:
                self.save()
                self._checkpoints.wait()
            except CheckpointError:
                if self.is_whole():
                    raise
        if together:
            wait_for_all("the last checkpoint")  # a process that is gone would end the others before theirs is whole


def _checked(out: pathlib.Path, resume: bool) -> bool:
    """Process 0's `resume`, which has to fit what is in `out`."""
    resume = process_0_says(resume)
    if not is_primary():
        return resume
    there = (out / CONFIG).exists()
    if resume and not there:
        raise CheckpointError(f"{out} holds no run to resume", f"it has no {CONFIG}", "leave out --resume to begin one")
    if not resume and is_taken(out):
        what = "holds a run" if there else "is not empty"
        raise ConfigError(f"{out} {what}", "", f"--resume to go on with it, or another folder: --out {out}-2")
    return resume


def _write_config(config: Config, out: pathlib.Path) -> None:
    write_atomic(out / CONFIG, to_toml(config).encode())


def _begin(built: Built, keeper: Keeper, out: pathlib.Path, say) -> Position:
    position = Position(0, LevelState(built.node.config.level.start))
    if is_primary():
        out.mkdir(parents=True, exist_ok=True)
        _write_config(built.node.config, out)  # from here on the folder holds a run
        write_texts(built.base, out)
    keeper.mark(position)
    keeper.save()  # a run that is killed in its first rounds resumes from here
    for source, reasons in built.skipped.items():
        left_out = ", ".join(f"{n} x {reason}" for reason, n in reasons.items() if n)
        if left_out:
            say("note", text=f"{source}: left out {left_out}")
    return position


def _resume(built: Built, checkpoints: Checkpoints, ledger: RunLedger, out: pathlib.Path) -> Position:
    number, state, host = checkpoints.restore(state_target(built.learner.state))
    config = built.node.config
    changed = [key for key in changed_keys(from_dict(host["config"]), config) if not _may_change(key, config)]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} changed since round {number} of {out} was saved",
            "a resumed run continues exactly, so its configuration must be the same",
            f"cz-jax train {out / CONFIG} --out {out} --resume",
        )
    if host["base_digest"] != built.base_digest:
        raise CheckpointError(
            f"{config.solver.model} is not the model that {out} began with", "its weights were replaced"
        )
    built.learner.restore(state)
    if is_primary():
        ledger.truncate_after(number)
        _write_config(config, out)  # with what a resumed run may change
    return built.restore(number, host)


def _may_change(key: str, config: Config) -> bool:
    if key == "run.rounds":  # a schedule that falls depends on it
        return config.optimizer.schedule == "constant"
    return key.startswith(("eval.", "checkpoint.", "report.")) or key in (*MACHINE_KEYS, *RELAY_KEYS)


def _evaluate(built: Built, when: str, say) -> dict:
    config = built.node.config
    result = evaluate(
        built.solver, built.evaluator, built.held_out, config.eval.k, config.evaluator.max_failed_share, say
    )
    say("evaluated", when=when, **{key: result[key] for key in ("average_at_k", "pass_at_k", "n_tasks")})
    return result


def _write_evaluations(out: pathlib.Path, evaluations: dict) -> None:
    if is_primary():
        write_atomic(out / EVALUATIONS, json.dumps(evaluations, sort_keys=True, indent=2).encode())


def _finish(built: Built, ledger: RunLedger, out: pathlib.Path, started: float, after: dict | None, say) -> dict:
    config = built.node.config
    evaluations = json.loads((out / EVALUATIONS).read_bytes()) if (out / EVALUATIONS).exists() else {}
    if after is not None:
        evaluations["after"] = after
        _write_evaluations(out, evaluations)
    rounds = list(ledger.rounds())
    rewards = [r["reward"] for r in rounds if r.get("reward") is not None]
    tokens = sum(r.get("completion_tokens", 0) for r in rounds)
    sampling = sum(r["seconds_by_phase"]["roll_out"] for r in rounds)
    export = out / "export" / f"round-{len(rounds):06d}"
    summary = {
        "rounds": len(rounds),
        "nodes": 1,
        "seconds": round(time.perf_counter() - started, 3),
        "reward_mean_first10": fmean(rewards[:10]) if rewards else None,
        "reward_mean_last10": fmean(rewards[-10:]) if rewards else None,
        **{f"{name}_{when}": value.get(key) for when, value in evaluations.items() for name, key in SCORES},
        "avg_at_k_gain": _gain(evaluations),
        "level_history": [r["level"] for r in rounds],
        "groups_shared": sum(r["groups_own"] for r in rounds),
        "groups_used_from_peers": sum(r["groups_external"] for r in rounds),
        "tokens_per_second": tokens / sampling if sampling else None,
        "policy_digest": built.learner.policy_digest(),
        "export_dir": str(export) if jax.process_count() == 1 else None,
        "report": str(out / REPORT),
        "seed": config.run.seed,
        "versions": {p: version(p) for p in ("cz-jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")},
        "next": [
            f"cz-jax eval --model {out} --tasks builtin@held_out -k {config.eval.k}",
            f"cz-jax train {out / CONFIG} run.rounds={2 * len(rounds)} --out {out} --resume",
            f"cz-jax export {out} my-model",
        ],
    }
    ledger.write_summary(summary)  # before the export: its card tells the scores
    if jax.process_count() == 1 and not export.exists():  # the weights of several hosts are exported by one of them
        say("phase", name=f"exporting to {export}")
        export_run(out, export)
    return summary


def _gain(evaluations: dict) -> dict | None:
    """What average@k gained over the run, on the tasks that both evaluations have."""
    before, after = (evaluations.get(when, {}).get("success_by_task", {}) for when in ("before", "after"))
    both = [task for task in before if task in after]
    return gain_estimate([before[t] for t in both], [after[t] for t in both]) if both else None


SCORES = (("avg_at_k", "average_at_k"), ("pass_at_k", "pass_at_k"), ("solve_rate_by_level", "by_level"))


def evaluate_model(
    model: str, tasks: str, k: int, evaluator: str | None = None, config: Config | None = None, say: Callable = quiet
) -> dict:
    """average@k and pass@k of `model` on the task source `tasks`, judged by `evaluator` (None: evaluator.model)."""
    config = config or Config()
    prepare(config.run)
    some = spread(load_tasks(tasks).tasks, config.eval.max_tasks or 1 << 30)
    mesh = mesh_of(config)
    say("phase", name=f"loading {model}")
    solver_model = load_model(model, config.solver.revision, config.solver.param_dtype, mesh, config.run.attention)
    seats = config.sampling.max_sequences
    judge_name, e = evaluator or config.evaluator.model, config.evaluator
    same = judge_name == model and e.dtype == config.solver.param_dtype
    judge = solver_model if same else load_model(judge_name, e.revision, e.dtype, mesh, config.run.attention)
    digest = solver_model.digest()
    solver = ModelSolver(
        solver_model.engine(mesh, config.solver.compute_dtype, seats), config.sampling, k, config.run.seed, "eval",
        lambda: digest,
    )  # fmt: skip
    judging = ModelEvaluator(judge.engine(mesh, e.dtype, seats), e, config.run.seed)
    result = evaluate(solver, judging, some, k, e.max_failed_share, say)
    return {"model": model, "evaluator": judge_name, "tasks": tasks, "model_digest": digest} | result


def judge_model(
    model: str, pairs, mode: str, config: Config | None = None, limit: int | None = None, say: Callable = quiet
) -> dict:
    """How good `model` is as an evaluator on the labelled answers of a JSONL file: see `metrics.judge_quality`."""
    config = config or Config()
    prepare(config.run)
    labelled = read_pairs(pathlib.Path(pairs), limit)
    mesh = mesh_of(config)
    e = config.evaluator.model_copy(update={"model": model, "mode": mode})
    say("phase", name=f"loading {model}")
    loaded = load_model(model, e.revision, e.dtype, mesh, config.run.attention)
    engine = loaded.engine(mesh, e.dtype, config.sampling.max_sequences)
    evaluator = ModelEvaluator(engine, e, config.run.seed)
    verdicts = []
    for start in range(0, len(labelled), PAIRS_AT_ONCE):
        say("phase", name=f"judging answer {start + 1} of {len(labelled)}")
        verdicts += evaluator.judge_pairs([(t, code) for t, code, _ in labelled[start : start + PAIRS_AT_ONCE]])
    failed = sum(v.outcome is Outcome.FAILED for v in verdicts)
    decided = [
        (v.probability, label)
        for v, (_, _, label) in zip(verdicts, labelled, strict=True)
        if v.outcome is not Outcome.FAILED
    ]
    if not decided:
        raise TaskError(f"every verdict of {model} failed: {verdicts[0].detail}", "a broken model")
    quality = judge_quality([p for p, _ in decided], [label for _, label in decided], e.threshold)
    return {"model": model, "mode": mode, "n_pairs": len(labelled), "failed": failed} | quality


def read_pairs(path: pathlib.Path, limit: int | None) -> list[tuple[Task, str, bool]]:
    """(task, answer, whether it is right) of each row of a JSONL file with the fields prompt, entry_point, test_list,
    solution and label (0 or 1). TaskError for a file or a row that is not like that."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise TaskError(f"{path} cannot be read: {e}", "", "--pairs FILE.jsonl") from None
    rows = []
    for number, line in enumerate(lines[:limit], 1):
        try:
            row = json.loads(line)
            task = Task("file", row["prompt"], tuple(row["test_list"]), row["entry_point"], 1)
            rows.append((task, row["solution"], {0: False, 1: True}[row["label"]]))
            if not all(isinstance(t, str) for t in (task.question, *task.tests, row["solution"])):
                raise ValueError("a field that should be text is not")
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise TaskError(
                f"{path} line {number} is no labelled answer: {e!r}",
                "",
                "one JSON object a line with prompt, entry_point, test_list, solution, label",
            ) from None
    if not rows:
        raise TaskError(f"{path} holds no labelled answers")
    return rows
