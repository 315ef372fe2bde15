"""Commands of a swarm: relay, propose."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from cz_jax.cli import options, show


def relay(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")],
    data: Annotated[
        str,
        typer.Option(metavar="DIR", help="The folder that keeps the log, or redis://HOST:PORT/DB for several relays."),
    ],
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM certificate (chain).")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM private key of the certificate.")] = None,
    allow: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Peer ids that may publish, one a line; anybody otherwise.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plaintext beyond loopback, too.")] = False,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Prometheus metrics over HTTP; none otherwise.")
    ] = None,
    page: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A read-only page to look at, over HTTP; none otherwise.")
    ] = None,
    retain_hours: Annotated[float, typer.Option(min=1.0, max=8760.0, help="Older messages are dropped.")] = 24.0,
    retain_mb: Annotated[
        int, typer.Option(min=1, max=1 << 30, help="The oldest beyond so many MB are dropped.")
    ] = 8192,
    peer_rate: Annotated[float, typer.Option(min=0.01, help="Messages a second that one peer may publish.")] = 500.0,
    as_json: options.Json = False,
):
    """Carry groups and proposals between nodes.

    Writes one JSON object a line to stderr about what happens. SIGTERM or Ctrl-C ends it within ten seconds, and
    nothing that it acknowledged is lost.

    \b
    Example:
      cz-jax relay --listen 127.0.0.1:7443 --data relay-data --page 127.0.0.1:8443
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when grpc is loaded; its lines are not JSON
    from cz_jax.swarm.log import Limits
    from cz_jax.swarm.relay import JsonLines, RelayOptions, serve

    limits = Limits(retain_seconds=retain_hours * 3600, retain_bytes=retain_mb << 20, peer_rate=peer_rate)
    chosen = RelayOptions(listen, data, tls_cert, tls_key, allow, insecure, metrics, page, limits)
    show.result(serve(chosen, JsonLines()), as_json)


def propose(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration; it names swarm.relay.")],
    settings: options.Settings = (),
    out: Annotated[Path | None, typer.Option(help="Keeps identity and level; runs/<name of CONFIG>-proposer.")] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="How often to propose; until Ctrl-C otherwise.")] = None,
    as_json: options.Json = False,
):
    """Feed a swarm with tasks as CONFIG.toml says.

    The level moves with how the answers that come back fare before this node's own evaluator.

    \b
    Example:
      cz-jax propose configs/cpu.toml swarm.relay=127.0.0.1:7443
    """
    from cz_jax.config import load

    out = Path("runs") / f"{config.stem}-proposer" if out is None else out
    resolved = load(config, settings)
    with show.progress() as say:
        say("phase", name="loading JAX", expected=5)
        from cz_jax.build import propose

        try:
            value = propose(config=resolved, out=out, turns=turns, say=say)
        except KeyboardInterrupt:
            words = ["cz-jax", "propose", str(config), *settings, "--out", str(out)]
            show.complain(f"interrupted; go on with: {shlex.join(words)}")
            raise typer.Exit(130) from None
    show.result(value, as_json)
