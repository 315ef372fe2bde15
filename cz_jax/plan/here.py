"""Whether a configuration fits this machine, and whether what it names beyond it can be had from here."""

import jax

from cz_jax.build.swarm import connect
from cz_jax.checkpoint.places import place_at
from cz_jax.config import Config
from cz_jax.convert.folder import unavailable
from cz_jax.errors import ConfigError, ModelFolderError, UserError, one_line
from cz_jax.plan import memory
from cz_jax.plan.count import count, nearest_fit
from cz_jax.plan.targets import SHARE, Chip, Target

RELAY_SECONDS = 5.0


def fit(config: Config, ram_bytes: int | None) -> tuple[dict | None, list[str]]:
    """({"bytes_per_device", "of"} of a round of `config` on the devices of this process, counted from shapes; a
    sentence with the nearest change where they are too small). None where that cannot be counted."""
    device, number = jax.devices()[0], len(jax.devices())
    stats = device.memory_stats() if device.platform != "cpu" else None
    usable = (stats or {}).get("bytes_limit") or int((ram_bytes or 0) * SHARE / number)  # simulated devices share it
    if not usable:
        return None, []
    target = Target("here", device.platform, Chip(device.device_kind, usable, 0.0, 0.0), number, jax.process_count())
    try:
        counted = count(config, target)
    except (ConfigError, ModelFolderError):  # told by those who look at devices and models
        return None, []
    total = memory.by_kind(counted.kinds, counted.phases, counted.kv_cache)["total"]
    found = {"bytes_per_device": total, "of": usable}
    if total <= usable:
        return found, []
    advice = nearest_fit(config, target, {}).get("settings")
    fix = " ".join(advice) if advice else "a smaller model, or a machine with more memory"
    return found, [f"a round needs {total / 1e9:.1f} GB of each device, which has {usable / 1e9:.1f}. Try: {fix}"]


def unreachable(config: Config) -> list[str]:
    """A sentence, with what to do, for each of relay, bucket and models of `config` that cannot be had from here."""
    roles = (config.solver, config.proposer, config.evaluator)
    wanted = dict.fromkeys((r.model, r.revision) for r in roles if r.model not in (None, "none"))
    said = [unavailable(model, revision) for model, revision in wanted]
    return [sentence for sentence in (*_relay(config), *_bucket(config), *said) if sentence]


def _relay(config: Config) -> list[str]:
    try:
        link = connect(config, None, lambda *_, **__: None)
    except UserError as e:
        return [str(e)]
    if link is None:
        return []
    try:
        if link.fetch("proposal", 0, 1, None, RELAY_SECONDS, 0.0) is not None:
            return []
        return link.take_notes() or [f"relay {config.swarm.relay} did not answer within {RELAY_SECONDS:g} s"]
    finally:
        link.close(0.0)


def _bucket(config: Config) -> list[str]:
    try:
        if config.checkpoint.folder:
            place_at(config.checkpoint.folder).names()
    except (UserError, OSError) as e:
        return [one_line(str(e))]
    return []
