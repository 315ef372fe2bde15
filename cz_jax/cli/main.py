"""`cz-jax`: the table of commands, and what becomes of an error.

Exit status: 0 done, 2 bad input (one line, no traceback), 130 on Ctrl-C, 143 on SIGTERM, 75 another process of
the run is gone, 1 anything else, with its traceback.
"""

import contextlib
import os
import signal
import sys
import traceback
from typing import Annotated

import typer

from cz_jax.cli import machine, models, runs, show, swarm
from cz_jax.errors import UserError, one_line

_UsageError = typer.BadParameter.__bases__[0]  # typer exports the leaf alone


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        show.write_stdout(f"cz-jax {version('cz-jax')}\n")
        raise typer.Exit()


def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
):
    """CodeZero on JAX: models that propose coding tasks, solve them, judge the answers and learn, without running any.

    \b
    Example:
      cz-jax demo
    """


def _group(name: str, about: str, commands: dict) -> typer.Typer:
    group = typer.Typer(name=name, help=about, rich_markup_mode=None, add_completion=False)
    for command, function in commands.items():
        group.command(command)(function)
    return group


def _app() -> typer.Typer:
    commands = {
        "demo": runs.demo, "train": runs.train, "propose": swarm.propose, "relay": swarm.relay, "eval": models.eval_,
        "judge": models.judge, "convert": models.convert, "export": models.export, "report": runs.report,
        "bench": models.bench, "plan": machine.plan, "doctor": machine.doctor,
    }  # fmt: skip
    app = _group("cz-jax", _root.__doc__, commands)
    app.callback()(_root)
    show_identity = {"new": machine.identity_new, "show": machine.identity_show}
    app.add_typer(
        _group(
            "identity", "Make or show a peer identity.\n\n\b\nExample:\n  cz-jax identity new peer.key", show_identity
        )
    )
    show_config = {"show": machine.config_show}
    example = "Example:\n  cz-jax config show configs/cpu.toml"
    app.add_typer(_group("config", f"Show a configuration with every default filled in.\n\n\b\n{example}", show_config))
    return app


command = typer.main.get_command(_app())


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status. Defects of ours escape, so that their traceback is seen."""
    args = list(sys.argv[1:] if argv is None else argv)
    asked_nothing = not args
    try:
        with command.make_context("cz-jax", args or ["--help"]) as context:
            command.invoke(context)
        return 0
    except typer.Exit as e:
        return 2 if asked_nothing else e.exit_code
    except UserError as e:
        show.complain(str(e))
        return 2
    except _UsageError as e:
        path = e.ctx.command_path if e.ctx else "cz-jax"
        show.complain(f"{one_line(e.format_message()).rstrip('.')}. Try: {path} --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        show.complain("interrupted")
        return 130
    except BrokenPipeError:
        if show.reader_left(sys.stderr):
            show.drop(sys.stderr)
            show.drop(sys.stdout)
            return 1
        if show.reader_left(sys.stdout):  # a result that nobody wants to see the rest of
            show.drop(sys.stdout)
            return 0
        raise


def _leave(number, frame) -> None:
    """SIGTERM where nothing stands yet that would save or tidy up: out at once, in the middle of an import if need be,
    which an exception would break."""
    os.write(2, b"cz-jax: preempted by SIGTERM; begin again with the same command\n")
    os._exit(143)


def program() -> None:
    """The console script: `main`, and out. After an interrupt or a defect at once: a compiled program may still be
    computing in a thread, which an ordinary exit would wait for or crash in, and jax.distributed waits for others."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)
