"""A model trained on sheets of text: first weights, losses, steps, stages."""

import dataclasses
import pathlib
import random
import time
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cz_jax.convert.tokenizer import load_tokenizer
from cz_jax.grpo.optimizer import is_decayed
from cz_jax.models import qwen
from cz_jax.models.spec import Arch, tree_of, weights
from tiny.sheets import batches_of, make_sheets
from tiny.text import RIGHT
from tiny.tokenizer import CONTEXT

VOCABULARY = 1536
ARCH = Arch("qwen2", VOCABULARY, 128, 384, 6, 4, 2, 32, 10000.0, 1e-6, True, CONTEXT)
LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Stage:
    """One run of the optimizer. `sheets`: how many of each kind; `noise`: in the solver's answers."""

    name: str
    sheets: dict[str, int]
    rate: float
    noise: float = 0.0
    prompt_share: float = 0.3  # weights of the prompts' and the marks' loss beside the answers'
    mark_share: float = 1.0
    extra_layers: int = 0  # put on top before this stage


def first_params(seed: int, arch: Arch = ARCH) -> dict:
    """Kernels by the width of their input, those that write into the residual stream smaller by depth."""
    rng = np.random.default_rng(seed)

    def leaf(w):
        if w.init in ("ones", "zeros"):
            return jnp.full(w.shape, float(w.init == "ones"), jnp.float32)
        if w.path == ("embed",):
            scale = 0.05
        else:
            scale = w.shape[-2] ** -0.5 * ((2 * arch.layers) ** -0.5 if w.path[1] in ("o", "down") else 1.0)
        return jnp.asarray(scale * rng.standard_normal(w.shape), jnp.float32)

    return tree_of(weights(arch), leaf)


def deepened(params: dict, extra: int, seed: int) -> dict:
    """`params` with `extra` layers on top that at first change nothing: a prediction that the layers below have made
    can then be compared with the token that came, which a model as deep as its prediction needs has no room for."""
    fresh = first_params(seed, dataclasses.replace(arch_of(params), layers=arch_of(params).layers + extra))

    def leaf(path, old, new):
        if path[0].key != "layers":
            return old
        top = np.zeros_like(new[:extra]) if path[1].key in ("o", "down") else np.asarray(new[:extra])
        return np.concatenate([old, top])

    return jax.tree_util.tree_map_with_path(leaf, params, fresh)


def arch_of(params: dict) -> Arch:
    return dataclasses.replace(ARCH, layers=len(params["layers"]["attn_norm"]))


def losses(params, batch, choices, only_last: bool):
    """(mean loss of the weighted tokens, of the prompts' tokens, of the weighted marks, weighted share of marks told
    right). A mark is read from the difference of the logits of true and false behind its token."""
    arch = arch_of(params)
    prompt, suffix = qwen.shared_forward(arch, params, batch["prompts"], batch["lengths"], batch["rows"])
    hidden = qwen.predicting_hidden(prompt, batch["lengths"], suffix)
    head, targets, weight = qwen.head_matrix(arch, params), batch["rows"], batch["weights"]
    if only_last:
        at = (batch["ends"] - 1)[..., None]
        hidden = jnp.take_along_axis(hidden, at[..., None], axis=2)
        targets, weight = (jnp.take_along_axis(x, at, axis=2) for x in (targets, weight))
    p, tp = batch["prompts"].shape
    loss = optax.softmax_cross_entropy_with_integer_labels(
        qwen.logits_of(jnp.concatenate([prompt[:, :-1], hidden.reshape(p, -1, hidden.shape[-1])], 1), head),
        jnp.concatenate([batch["prompts"][:, 1:], targets.reshape(p, -1)], 1),
    )
    own = (loss[:, tp - 1 :] * weight.reshape(p, -1)).sum() / jnp.maximum(weight.sum(), 1.0)
    inside = jnp.arange(1, tp) < batch["lengths"][:, None]
    read = jnp.where(inside, loss[:, : tp - 1], 0.0).sum() / inside.sum()
    right = batch["marks"] == RIGHT
    logit = suffix @ (head[:, choices[0]] - head[:, choices[1]])
    share = batch["mark_weights"] / jnp.maximum(batch["mark_weights"].sum(), 1.0)
    marks = optax.sigmoid_binary_cross_entropy(logit, right)
    return own, read, (share * marks).sum(), (share * ((logit > 0) == right)).sum()


def is_decayed_tree(params) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path), params)


# AdamW but for the learning rate, which a step is given: stages then share their compiled programs.
ADAMW = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.98),
    optax.add_decayed_weights(0.05, is_decayed_tree),
)


@partial(jax.jit, static_argnames="only_last", donate_argnums=(0, 1))
def step(params, state, batch, choices, shares, rate, *, only_last: bool):
    """`shares`: weights of the prompts' and of the marks' loss beside that of the answers."""

    def total(params):
        own, read, marks, told = losses(params, batch, choices, only_last)
        return own + shares[0] * read + shares[1] * marks, (own, read, marks, told)

    (_, parts), gradients = jax.value_and_grad(total, has_aux=True)(params)
    updates, state = ADAMW.update(gradients, state, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, parts


def schedule(peak: float, steps: int):
    """Step -> learning rate: a short rise, then half a cosine."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, min(100, steps // 10)), max(2, steps), peak * 0.02)


def train_stages(
    stages: tuple[Stage, ...], params: dict | None, folder: pathlib.Path, seed: int, speaker: pathlib.Path | None = None
) -> tuple[dict, dict]:
    """(NumPy parameters after `stages`, the last losses of each by kind of sheet). `params`: to begin with, or None:
    first ones. `folder` holds the tokenizer, `speaker` the model of "spoken" sheets. For a process of its own: it keeps
    about one core busy."""
    params, logs = first_params(seed) if params is None else params, {}
    for stage in stages:
        if stage.extra_layers:
            params = deepened(params, stage.extra_layers, seed + 1)
        params, logs[stage.name] = train_stage(stage, params, folder, seed, speaker)
    return jax.tree.map(np.asarray, params), logs


def train_stage(
    stage: Stage, params: dict, folder: pathlib.Path, seed: int, speaker: pathlib.Path | None = None
) -> tuple[dict, dict]:
    tokenizer = load_tokenizer(folder, ARCH)
    choices = jnp.array([tokenizer.encode(f'{{"is_correct": {word}}}')[-2] for word in ("true", "false")])
    begun = time.perf_counter()
    sheets = make_sheets(stage.sheets, f"{seed}/{stage.name}", stage.noise, folder, speaker)
    batches = batches_of(sheets, random.Random(f"{seed}/{stage.name}"), ARCH.vocab_size - 1)
    tokens = sum(b["prompts"].size + b["rows"].size for b in batches)
    text_seconds = time.perf_counter() - begun
    say(f"{stage.name}: {len(sheets)} sheets, {len(batches)} steps, {tokens} tokens; text {text_seconds:.0f} s")
    rate_at = schedule(stage.rate, len(batches))
    params = jax.tree.map(jnp.array, params)  # a copy: a step takes its input apart
    state = ADAMW.init(params)
    shares = jnp.array([stage.prompt_share, stage.mark_share])
    begun, last = time.perf_counter(), {}
    recent: dict[str, list] = {}
    for number, batch in enumerate(batches, 1):
        kind, only_last = batch.pop("kind"), batch.pop("only_last")
        params, state, parts = step(params, state, batch, choices, shares, rate_at(number), only_last=only_last)
        recent.setdefault(kind, []).append(parts)
        if number % LOG_EVERY == 0 or number == len(batches):
            means = {k: [round(float(np.mean(x)), 4) for x in zip(*v, strict=True)] for k, v in recent.items()}
            last |= means
            recent = {}
            told = ", ".join(_line(kind, *numbers) for kind, numbers in sorted(means.items()))
            say(f"  {stage.name} step {number}/{len(batches)} {time.perf_counter() - begun:.0f} s: {told}")
    names = ("loss", "prompt_loss", "mark_loss", "marks_right")
    log = {kind: dict(zip(names, numbers, strict=True)) for kind, numbers in last.items()}
    return params, log


def _line(kind: str, own: float, read: float, marks: float, told: float) -> str:
    said = f"{kind} {own:.3f}, prompt {read:.3f}"
    return said + (f", marks {marks:.3f} ({told:.1%} right)" if marks else "")


def say(text: str) -> None:
    print(text, flush=True)
