"""CodeZero on JAX: models that propose coding tasks, solve them, judge the answers and learn, without running any.

    from cz_jax import load_config, train
    summary = train(load_config("configs/cpu.toml", ["run.rounds=5"]), out="runs/first", resume=False)

The verbs of the command line are functions here; they are imported when first asked for, so that importing `cz_jax`
alone loads neither JAX nor a model library.
"""

from cz_jax.nouns import Group, Level, Outcome, Reward, Rollout, Round, Task, Verdict

_VERBS = ("convert_model", "evaluate_model", "export_run", "judge_model", "train")

__all__ = [
    "Group",
    "Level",
    "Outcome",
    "Reward",
    "Rollout",
    "Round",
    "Task",
    "Verdict",
    "Config",
    "load_config",
    "demo",
    *_VERBS,
]


def __getattr__(name):
    if name in _VERBS:
        from cz_jax import build

        return getattr(build, name)
    if name == "demo":
        from cz_jax.local_swarm import demo

        return demo
    if name == "load_config":
        from cz_jax.config import load

        return load
    if name == "Config":
        from cz_jax.config import Config

        return Config
    if name == "__version__":
        from importlib.metadata import version

        return version("cz-jax")
    raise AttributeError(f"module 'cz_jax' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, "__version__"})
