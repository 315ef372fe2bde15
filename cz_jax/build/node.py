"""A Config becomes a Node: every role with its model, the task stream, the learner, and what a checkpoint keeps of
them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cz_jax import parallel
from cz_jax.build.models import Loaded, load_model, sharding_rule
from cz_jax.config import Config
from cz_jax.difficulty import LevelState
from cz_jax.doctor import compile_cache_folder
from cz_jax.errors import ModelFolderError
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
from cz_jax.tasks import held_out_keys, load_tasks
from cz_jax.tasks.stream import MixedStream


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
        if self.node.proposer is not None:
            self.node.proposer.restore(host["proposer"])
        return Position(number, LevelState.from_dict(host["level"]))


def set_compile_cache(setting: str) -> None:
    """Compiled programs are kept from run to run in the folder that run.compile_cache names."""
    folder = compile_cache_folder(setting)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def mesh_of(config: Config):
    return parallel.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


class Pool:
    """The frozen models of a node: one in memory for all roles that name the same folder in the same dtype."""

    def __init__(self, mesh, say):
        self._mesh, self._say = mesh, say
        self._loaded: dict[tuple, Loaded] = {}

    def get(self, model: str, revision: str | None, dtype: str) -> Loaded:
        key = (model, revision, dtype)
        if key not in self._loaded:
            self._say("phase", name=f"loading {model}")
            self._loaded[key] = load_model(model, revision, dtype, self._mesh)
        return self._loaded[key]


def build(config: Config, say) -> Built:
    """The node of `config`, its models loaded. UserError where something that it names is not usable."""
    set_compile_cache(config.run.compile_cache)
    mesh = mesh_of(config)
    held_out = tuple(t for spec in config.tasks.held_out for t in load_tasks(spec).tasks)
    sources = {spec: load_tasks(spec) for spec in config.tasks.sources}
    for_eval = [t for spec in config.eval.tasks for t in load_tasks(spec).tasks] or list(held_out)
    pool = Pool(mesh, say)
    s, e, p = config.solver, config.evaluator, config.proposer
    seats = config.sampling.max_sequences
    base = pool.get(s.model, s.revision, s.param_dtype)
    judge = pool.get(e.model, e.revision, e.dtype)
    evaluator = ModelEvaluator(judge.engine(mesh, e.dtype, seats), e, config.run.seed)
    proposer = None
    if p.model not in (None, "none"):
        proposer = ModelProposer(
            pool.get(p.model, p.revision, p.dtype).engine(mesh, p.dtype, seats), p, config.run.seed
        )
    solver, learner = build_solver(config, base, mesh)
    stream = MixedStream(
        [loaded.tasks for loaded in sources.values()],
        config.tasks.weights,
        seed_for(config.run.seed, "shuffle"),
        held_out_keys([*held_out, *for_eval]),
        solver.fits,
    )
    node = Node(config, proposer, stream, solver.fits, solver, evaluator, Alone(), learner)
    limit = config.eval.max_tasks or len(for_eval)
    skipped = {spec: loaded.skipped for spec, loaded in sources.items()}
    skipped["all"] = {"held out": stream.excluded, "duplicate": stream.duplicates, "prompt too long": stream.too_long}
    return Built(node, solver, evaluator, learner, base, base.digest(), tuple(spread(for_eval, limit)), skipped)


def build_solver(config: Config, base: Loaded, mesh) -> tuple[ModelSolver, GrpoLearner]:
    """The two sides of the solver over one train state: full weights of its own, or pairs over the shared base."""
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
        params = jax.tree.map(jnp.copy, base.params)  # the state is donated; frozen roles keep theirs
        shardings = jax.tree.map(lambda a: a.sharding, params)
    engine = base.engine(mesh, config.solver.compute_dtype, config.sampling.max_sequences, lambda: learner.params())
    solver = ModelSolver(
        engine, config.sampling, config.round.group_size, config.run.seed, config.run.peer or "solver",
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
