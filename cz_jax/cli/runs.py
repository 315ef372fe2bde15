"""Commands that run rounds: demo, train."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from cz_jax.cli import options, show
from cz_jax.errors import Preempted


def demo(
    out: Annotated[Path | None, typer.Option(help="The run folder; a new one otherwise.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How many rounds each node plays.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, max=16, help="How many solver nodes there are.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=1_000_000, help="Of every random choice.")] = None,
    as_json: options.Json = False,
):
    """Play the whole loop in a swarm on this machine, with a tiny embedded model.

    A relay, a proposer and two solver nodes, each a process, play 60 rounds on the CPU. It takes minutes and needs no
    network, account or configuration. After Ctrl-C the same command with --out goes on.

    \b
    Example:
      cz-jax demo --rounds 40 --out runs/demo
    """
    from cz_jax.cli.live import SwarmProgress
    from cz_jax.local_swarm import demo, folder_for
    from cz_jax.preemption import sigterm_preempts

    out = folder_for(out)
    with sigterm_preempts(raising=True), show.progress(SwarmProgress) as say:
        try:
            summary = demo(out=out, rounds=rounds, nodes=nodes, seed=seed, say=say)
        except KeyboardInterrupt as e:
            told, status = _interrupted(e)
            show.complain(f"{told}; go on with: cz-jax demo --out {shlex.quote(str(out))}")
            raise typer.Exit(status) from None
    show.result(summary, as_json)


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="The configuration, for example configs/cpu.toml.")
    ],
    settings: options.Settings = (),
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/<name of CONFIG> otherwise.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the folder.")] = False,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of process 0, where several processes make one run.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="How many processes make the run.")] = None,
    process: Annotated[int | None, typer.Option(min=0, help="Which of them this is.")] = None,
    trace: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Record the Nth round from here on with jax.profiler.")
    ] = None,
    as_json: options.Json = False,
):
    """Train a solver as CONFIG.toml says.

    Ctrl-C once saves the run and prints the command that goes on with it; so does SIGTERM, with status 143. Where one
    of several processes is lost the others end with status 75; start all of them again with --resume.

    --trace 2 records the second round, after the first has compiled most programs, into OUT/trace; the report draws
    when the devices were busy.

    \b
    Example:
      cz-jax train configs/cpu.toml optimizer.learning_rate=1e-5 --out runs/first
    """
    from cz_jax.config import load

    out = Path("runs") / config.stem if out is None else out
    resolved = load(config, settings)
    with show.progress() as say:
        try:
            say("phase", name="loading JAX", expected=5)
            from cz_jax.build import train
            from cz_jax.processes import joined

            if processes is not None:
                say("phase", name=f"waiting for all {processes} processes")
            with joined(coordinator, processes, process, end_at_once):
                say("phase", name="")  # process 0 alone reports from here on
                summary = train(config=resolved, out=out, resume=resume, say=say, trace=trace)
        except KeyboardInterrupt as e:
            told, status = _interrupted(e)
            show.complain(f"{told}{_after_interrupt(config, settings, out)}")
            raise typer.Exit(status) from None
    show.result(summary, as_json)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: options.Json = False,
):
    """Write the report of a run again.

    One page, readable without network; every run writes its own at each checkpoint and at its end.

    \b
    Example:
      cz-jax report runs/first
    """
    from cz_jax.report import write_report

    show.result({"report": write_report(run)}, as_json)


def end_at_once(text: str, status: int) -> None:
    """Ends this process from whatever thread, with a last line: its main thread may hang in a collective."""
    show.complain(text)
    os._exit(status)


def _interrupted(error: KeyboardInterrupt) -> tuple[str, int]:
    """(what happened, exit status)."""
    return ("preempted by SIGTERM", 143) if isinstance(error, Preempted) else ("interrupted", 130)


def _after_interrupt(config: Path, settings, out: Path) -> str:
    """What to type next: go on where something was saved, else begin again."""
    saved = (out / "config.toml").exists()  # written once there is something to go on with
    words = ["cz-jax", "train", str(config), *settings, "--out", str(out), *(["--resume"] if saved else [])]
    told = "; go on with" if saved else " before anything was saved; begin again with"
    return f"{told}: {shlex.join(words)}"
