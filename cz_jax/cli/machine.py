"""Commands about machines and their files: doctor, plan, config show, identity new, identity show."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cz_jax.cli import options, show


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="A configuration to hold against it.")
    ] = None,
    as_json: options.Json = False,
):
    """Say what this machine can do.

    Fails where an accelerator is there and JAX does not use it, or another process holds it; and with CONFIG where a
    round does not fit by counting, or the relay, the bucket or a model that it names cannot be had from here. The
    output holds no secret and no user name.

    \b
    Example:
      cz-jax doctor configs/cpu.toml
    """
    resolved = None
    if config is not None:
        from cz_jax.config import load
        from cz_jax.parallel import prepare_devices

        resolved = load(config)
        prepare_devices(resolved.run.gpu_memory, resolved.run.xla_flags)
    with show.progress() as say:
        say("phase", name="looking at this machine", expected=5)
        from cz_jax.doctor import examine, redact

        value = examine(resolved)
        if resolved is not None and value["devices"]:
            from cz_jax.plan.here import fit, unreachable

            value["round"], problems = fit(resolved, value["ram_bytes"])
            say("phase", name="asking for what the configuration names", expected=10)
            value["problems"] += redact(problems + unreachable(resolved))
            value["ok"] = not value["problems"]
    show.result(value, as_json)
    for problem in value["problems"]:
        show.complain(problem)
    if value["problems"]:
        raise typer.Exit(1)


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration.")],
    topology: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="v4-8|16, v5e-1|4|8|16|32, v5p-8|16, v6e-1|4|8|16|32, gpu-24gb|80gb, cpu-16gb."
        ),
    ],
    settings: options.Settings = (),
    count: Annotated[bool, typer.Option("--count", help="Count from shapes; compile nothing.")] = False,
    as_json: options.Json = False,
):
    """Say whether a configuration fits a machine that is not there.

    Memory of each device by kind, FLOPs and estimated seconds of a round, and, where it does not fit, the nearest
    change that does. For a TPU slice the programs are compiled ahead of time (pip install 'cz-jax[plan]'), which takes
    minutes. No weight is loaded.

    \b
    Example:
      cz-jax plan configs/tpu-v5e-8.toml --topology v5e-8
    """
    from cz_jax.config import load

    resolved = load(config, settings)
    with show.progress() as say:
        say("phase", name="loading JAX", expected=5)
        from cz_jax.plan import plan

        value = plan(resolved, topology, not count, say)
    if (value["advice"] or {}).get("settings"):
        words = " ".join([*settings, *value["advice"]["settings"]])
        value["next"] = [f"cz-jax plan {config} --topology {topology} {words}"]
    show.result(value, as_json)


def config_show(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration.")],
    settings: options.Settings = (),
    as_json: options.Json = False,
):
    """Print a configuration, every default filled in.

    \b
    Example:
      cz-jax config show configs/cpu.toml round.group_size=16
    """
    from cz_jax.config import load, to_toml

    resolved = load(config, settings)
    if as_json:
        show.result(resolved.model_dump(mode="json"), True)
    else:
        show.write_stdout(to_toml(resolved))


def identity_new(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write; it may not exist yet.")],
    kind: Annotated[
        Literal["ed25519", "rsa"], typer.Option("--type", help="rsa is what RL Swarm's swarm.pem holds.")
    ] = "ed25519",
    as_json: options.Json = False,
):
    """Make a peer identity in a new file.

    Only you can read the file; an existing one is never overwritten.

    \b
    Example:
      cz-jax identity new peer.key
    """
    from cz_jax.swarm.identity import new_identity, write_identity

    identity = new_identity(kind)
    write_identity(identity, path)
    show.result({"peer_id": identity.peer_id, "name": identity.name, "type": identity.kind, "path": path}, as_json)


def identity_show(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An identity file, for example RL Swarm's swarm.pem.")],
    as_json: options.Json = False,
):
    """Print an identity's peer id and name.

    Never its private key.

    \b
    Example:
      cz-jax identity show swarm.pem --json
    """
    from cz_jax.swarm.identity import exposure, read_identity

    identity = read_identity(path)
    warning = exposure(path)
    if warning:
        show.complain(f"warning: {warning}")
    show.result({"peer_id": identity.peer_id, "name": identity.name, "type": identity.kind}, as_json)
