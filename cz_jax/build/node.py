"""A Config becomes a Node: every role with its model, the task stream, the learner, and what a checkpoint keeps of
them."""

import dataclasses
import os
import pathlib
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cz_jax import parallel
from cz_jax.build.models import Loaded, load_model, sharding_rule
from cz_jax.build.swarm import connect, trainable_task, usable_task
from cz_jax.config import Config, RunConfig
from cz_jax.difficulty import LevelState
from cz_jax.doctor import compile_cache_folder
from cz_jax.errors import ModelFolderError
from cz_jax.files import local_folder
from cz_jax.loop import Node, Position
from cz_jax.models import lora
from cz_jax.models.spec import tree_of
from cz_jax.nouns import Rollout
from cz_jax.rng import seed_for
from cz_jax.roles.evaluator import ModelEvaluator
from cz_jax.roles.learner import GrpoLearner
from cz_jax.roles.proposer import ModelProposer
from cz_jax.roles.solver import ModelSolver
from cz_jax.swarm.alone import Alone
from cz_jax.swarm.client import RelayProposer, SharingProposer, SwarmExchange
from cz_jax.swarm.link import Link
from cz_jax.tasks import held_out_keys, load_tasks
from cz_jax.tasks.stream import MixedStream

CACHED_FROM = 0.2  # seconds that a program took to compile; JAX's own second would leave most of a tiny model's out
CACHED_FROM_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


@dataclass(frozen=True)
class Built:
    """A node and what is kept of it beside the loop's ports."""

    node: Node
    solver: ModelSolver
    evaluator: ModelEvaluator
    learner: GrpoLearner
    base: Loaded
    base_digest: str
    held_out: tuple  # tasks for evaluation
    skipped: dict  # task source -> rows left out, by reason
    link: Link | None = None  # to the relay, where there is one

    def close(self) -> None:
        """Leaves the swarm; what is not yet shared goes out, if the relay takes it within seconds."""
        if self.link is not None:
            self.link.close()

    def host_state(self, position: Position) -> dict:
        """What a checkpoint keeps beside the arrays."""
        node = self.node
        return {
            "level": position.level.to_dict(),
            "tasks": node.tasks.state(),
            "proposer": node.proposer.state() if node.proposer is not None else None,
            "exchange": node.exchange.state(),
            "config": node.config.model_dump(mode="json"),
            "base_digest": self.base_digest,
        }

    def restore(self, number: int, host: dict) -> Position:
        self.node.tasks.restore(host["tasks"])
        self.node.exchange.restore(host["exchange"])
        if self.node.proposer is not None and host["proposer"] is not None:  # None: the run went without one so far
            self.node.proposer.restore(host["proposer"])
        return Position(number, LevelState.from_dict(host["level"]))


def set_compile_cache(setting: str) -> None:
    """Compiled programs are kept from run to run in the folder that run.compile_cache names; from CACHED_FROM on, where
    the environment does not name another limit."""
    folder = compile_cache_folder(setting)
    if folder is not None:
        local_folder(folder).mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if CACHED_FROM_VARIABLE not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHED_FROM)


def prepare(run: RunConfig) -> str:
    """The settings of `run` that JAX has to know before a device is asked for; what of them is to be shown."""
    set_compile_cache(run.compile_cache)
    return parallel.prepare_devices(run.gpu_memory, run.xla_flags)


def mesh_of(config: Config):
    return parallel.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


class Pool:
    """The frozen models of a node: one in memory for all roles that name the same folder in the same dtype."""

    def __init__(self, mesh, attention: str, say):
        self._mesh, self._attention, self._say = mesh, attention, say
        self._loaded: dict[tuple, Loaded] = {}
        self._asked: Counter = Counter()

    def is_shared(self, model: str, revision: str | None, dtype: str) -> bool:
        """Whether more than one role has asked for this model."""
        return self._asked[model, revision, dtype] > 1

    def get(self, model: str, revision: str | None, dtype: str) -> Loaded:
        key = (model, revision, dtype)
        self._asked[key] += 1
        if key not in self._loaded:
            self._say("phase", name=f"loading {model}")
            self._loaded[key] = load_model(model, revision, dtype, self._mesh, self._attention)
        return self._loaded[key]


def build(config: Config, say, folder: pathlib.Path | None = None) -> Built:
    """The node of `config`, its models loaded; `folder`: the run's, which keeps its identity in a swarm. UserError
    where something that it names is not usable."""
    mesh = mesh_of(config)
    held_out = tuple(t for spec in config.tasks.held_out for t in load_tasks(spec).tasks)
    sources = {spec: load_tasks(spec) for spec in config.tasks.sources}
    for_eval = [t for spec in config.eval.tasks for t in load_tasks(spec).tasks] or list(held_out)
    pool = Pool(mesh, config.run.attention, say)
    start = (config.solver.model, config.solver.revision, config.solver.param_dtype)
    base = pool.get(*start)
    evaluator = build_evaluator(config, pool, mesh)
    proposer = build_proposer(config, pool, mesh)
    link = connect(config, folder, say)
    peer = link.peer if link is not None else config.run.peer or "solver"
    digest = base.digest()
    solver, learner = build_solver(config, base, mesh, peer, keeps_base=pool.is_shared(*start) or config.grpo.kl > 0)
    base = dataclasses.replace(base, params={}, digest=lambda: digest)  # whoever needs the weights has them
    keep_out = held_out_keys([*held_out, *for_eval])
    stream = MixedStream(
        [loaded.tasks for loaded in sources.values()],
        config.tasks.weights,
        seed_for(config.run.seed, "shuffle"),
        keep_out,
        solver.fits,
    )
    exchange = Alone()
    if link is not None:
        known = [task for loaded in sources.values() for task in loaded.tasks]
        exchange, proposer = join(config, link, proposer, known, usable_task(keep_out, solver.fits), say)
    node = Node(config, proposer, stream, solver.fits, solver, evaluator, exchange, learner)
    limit = config.eval.max_tasks or len(for_eval)
    skipped = {spec: loaded.skipped for spec, loaded in sources.items()}
    skipped["all"] = {"held out": stream.excluded, "duplicate": stream.duplicates, "prompt too long": stream.too_long}
    return Built(node, solver, evaluator, learner, base, digest, tuple(spread(for_eval, limit)), skipped, link)


def build_evaluator(config: Config, pool: Pool, mesh) -> ModelEvaluator:
    e = config.evaluator
    engine = pool.get(e.model, e.revision, e.dtype).engine(mesh, e.dtype, config.sampling.max_sequences)
    return ModelEvaluator(engine, e, config.run.seed)


def build_proposer(config: Config, pool: Pool, mesh) -> ModelProposer | None:
    p = config.proposer
    if p.model in (None, "none"):
        return None
    engine = pool.get(p.model, p.revision, p.dtype).engine(mesh, p.dtype, config.sampling.max_sequences)
    return ModelProposer(engine, p, config.run.seed)


def join(config: Config, link: Link, proposer: ModelProposer | None, known, usable, say):
    """(exchange, proposer) of a node in a swarm: a node without a proposer takes its peers' proposals."""
    seed, admit = config.run.seed, trainable_task(config, known, usable)
    exchange = SwarmExchange(link, config.swarm, config.round.group_size, seed, admit, say)
    if proposer is None:
        return exchange, RelayProposer(link, config.swarm, config.proposer, seed, usable, say)
    return exchange, SharingProposer(proposer, link) if config.swarm.share_proposals else proposer


def build_solver(config: Config, base: Loaded, mesh, peer: str, keeps_base: bool) -> tuple[ModelSolver, GrpoLearner]:
    """The two sides of the solver over one train state: full weights of its own, or pairs over the shared base.

    keeps_base: somebody else holds on to the base's weights. Otherwise full training takes them over, and no second
    copy exists.
    """
    arch, rule = base.arch, sharding_rule(base.arch, mesh)
    if base.arch.max_context < config.sampling.max_new_tokens + 1:
        raise ModelFolderError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens} does not fit the context of {base.name}, which "
            f"is {arch.max_context}"
        )
    if config.lora.rank:
        table = lora.lora_weights(arch, config.lora.rank, config.lora.targets)
        pairs = lora.init_lora(
            arch, config.lora.rank, config.lora.alpha, config.lora.targets,
            seed_for(config.run.seed, "pairs") & 0x7FFFFFFF, jnp.float32, rule,
        )  # fmt: skip
        params = lora.join(pairs, base.params)
        shardings = lora.split(tree_of(table, rule))[0]
    else:
        params = jax.tree.map(jnp.copy, base.params) if keeps_base else base.params  # every step donates its state
        shardings = jax.tree.map(lambda a: a.sharding, params)
    engine = base.engine(mesh, config.solver.compute_dtype, config.sampling.max_sequences, lambda: learner.params())
    solver = ModelSolver(
        engine, config.sampling, config.round.group_size, config.run.seed, peer,
        lambda: learner.policy_digest(),
    )  # fmt: skip

    def encode_answer(rollout: Rollout) -> list[int]:
        tokens = [*base.tokenizer.encode(rollout.text), *base.tokenizer.eos_ids[: int(rollout.ended)]]
        return tokens[: config.sampling.max_new_tokens]

    reference = base.params if config.grpo.kl > 0 else None
    learner = GrpoLearner(arch, params, config, mesh, solver.prompt_tokens, encode_answer, shardings, reference)
    return solver, learner


def spread(tasks, limit: int) -> list:
    """At most `limit` of the tasks, evenly spaced, so that every part of the list is represented."""
    if len(tasks) <= limit:
        return list(tasks)
    return [tasks[i * len(tasks) // limit] for i in range(limit)]
