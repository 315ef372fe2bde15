"""Qwen2 and Qwen3 in one file, as Flax NNX modules over the weight table of `spec`.

The modules hold weights and the arithmetic of a block; which keys a query sees is the caller's matter, handed in as an
`attend` function. Outside of `models/` parameters are a plain tree of arrays (see `spec.weights`); a module is made
around them where it is used, inside the traced function.

Four ways through the model:
  `shared_forward`  prompts and their G suffixes, each prompt computed once: training, log-probabilities
  `last_hidden`     the same, for the last token of each suffix alone: reading verdicts
  `prefill`         prompts alone, keeping keys and values
  `decode`          one token for each of P x G rows over the prompt's cache and their own

Legend: P prompts, G rows of a prompt, T tokens (Tp prompt, Ts suffix), D hidden, V vocabulary, N query heads, K
key/value heads, H head size, L layers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from cz_jax.config import Remat
from cz_jax.models.attention import KEPT, Seats, attend_cached, attend_few, attend_packed
from cz_jax.models.spec import Arch, tree_of, weights
from cz_jax.parallel import constrain_batch

_POLICIES = {"products": jax.checkpoint_policies.save_only_these_names(KEPT), "layer": None}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x, kernel, dtype=None):
    """x [..., A] @ kernel [A, B] in `dtype` (None: theirs), whose derivatives are in theirs. That for the kernel is
    written as a product of matrices: where rows have several axes XLA on a CPU turns one operand over first, and moves
    it, and all arithmetic that leads there, element by element through memory."""
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _matmul_forward(x, kernel, dtype):
    return matmul(x, kernel, dtype), (x, kernel)


def _matmul_backward(_, kept, dy):
    x, kernel = kept
    dy = dy.astype(x.dtype)
    rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dy @ kernel.T, jax.lax.dot_general(rows_x, rows_dy, (((0,), (0,)), ((), ())))


matmul.defvjp(_matmul_forward, _matmul_backward)


def matmul_turned(x, kernel_BA):
    """x [..., A] times a kernel that lies as [B, A]. With the kernel as the left factor: a CPU reads weights that no
    cache holds for few rows up to half as fast again as the other way round."""
    y = jax.lax.dot_general(kernel_BA, x, (((1,), (x.ndim - 1,)), ((), ())))
    return jnp.moveaxis(y, 0, -1)


class Linear(nnx.Module):
    """x @ kernel + bias, with a low-rank addition where the leaves hold one. The kernel [A, B] may lie as [B, A], under
    the name `turned`."""

    def __init__(self, leaves: dict):
        self.turned = "turned" in leaves
        self.kernel = nnx.Param(leaves["turned" if self.turned else "kernel"])
        self.bias = nnx.Param(leaves["bias"]) if "bias" in leaves else None
        self.lora_a = nnx.LoRAParam(leaves["lora_a"]) if "lora_a" in leaves else None
        self.lora_b = nnx.LoRAParam(leaves["lora_b"]) if "lora_a" in leaves else None
        self.lora_scale = nnx.Variable(leaves["lora_scale"]) if "lora_a" in leaves else None

    def __call__(self, x):
        y = (matmul_turned if self.turned else matmul)(x, self.kernel[...].astype(x.dtype))
        if self.lora_a is not None:
            low = matmul(matmul(x, self.lora_a[...].astype(x.dtype)), self.lora_b[...].astype(x.dtype))
            y = y + low * self.lora_scale[...].astype(x.dtype)
        return checkpoint_name(y if self.bias is None else y + self.bias[...].astype(x.dtype), KEPT)


class RMSNorm(nnx.Module):
    def __init__(self, scale, eps: float):
        self.scale, self.eps = nnx.Param(scale), eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Block(nnx.Module):
    """One transformer layer around the leaves of layer i (no leading layer axis)."""

    def __init__(self, arch: Arch, leaves: dict):
        self.arch = arch
        self.attn_norm = RMSNorm(leaves["attn_norm"], arch.norm_eps)
        self.ffn_norm = RMSNorm(leaves["ffn_norm"], arch.norm_eps)
        self.q_norm = RMSNorm(leaves["q_norm"], arch.norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(leaves["k_norm"], arch.norm_eps) if arch.qk_norm else None
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            setattr(self, name, Linear(leaves[name]))

    def __call__(self, x, rope, attend_fn, cache, read_PR=None):
        """x [..., D] -> (x [..., D], what `attend_fn(q [..., N, H], k, v [..., K, H], cache)` returns beside its
        output). Of x [P, T, D] the tokens `read_PR` (None: all) go on; the others give keys and values alone."""
        y = self.attn_norm(x)
        k, v = self._heads(self.k, y), self._heads(self.v, y)
        k = rotate(k if self.k_norm is None else self.k_norm(k), rope)
        if read_PR is not None:
            x, y, *rope = (tokens_at(a, read_PR) for a in (x, y, *rope))
        q = self._heads(self.q, y)
        q = rotate(q if self.q_norm is None else self.q_norm(q), rope)
        out, cache = attend_fn(q, k, v, cache)
        x = x + self.o(out.reshape(*out.shape[:-2], -1))
        y = self.ffn_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y)), cache

    def _heads(self, linear: Linear, y):
        return linear(y).reshape(*y.shape[:-1], -1, self.arch.head_dim)


class Qwen(nnx.Module):
    """The whole model around a parameter tree."""

    def __init__(self, arch: Arch, params: dict):
        self.arch = arch
        self.embed = nnx.Param(params["embed"])
        self.layers = nnx.data(params["layers"])
        self.norm = RMSNorm(params["norm"], arch.norm_eps)
        self.lm_head = None if arch.tied_embeddings else nnx.Param(params["lm_head"])

    def embed_tokens(self, tokens, dtype):
        return constrain_batch(jnp.take(self.embed[...], tokens, axis=0, mode="clip").astype(dtype))

    def run(self, x, rope, attend_fn, caches=None, remat: Remat | None = None):
        """All layers and the final norm. `rope`: `rope_tables` of the tokens' positions. `caches`: per layer (leading
        L, or a tuple of L), handed to `attend_fn`; what it returns comes back in the same form. Stacked layers are
        scanned, a tuple of layers is unrolled."""

        def layer(x, leaves_cache):
            leaves, cache = leaves_cache
            x, cache = Block(self.arch, leaves)(x, rope, attend_fn, cache)
            return constrain_batch(x), cache

        if isinstance(self.layers, (tuple, list)):
            new = []
            for i, leaves in enumerate(self.layers):
                x, cache = layer(x, (leaves, None if caches is None else caches[i]))
                new.append(cache)
            new = tuple(new)
        else:
            step = layer if remat is None else jax.checkpoint(layer, policy=_POLICIES[remat], prevent_cse=False)
            x, new = jax.lax.scan(step, x, (self.layers, caches))
        return self.norm(x), new

    def read(self, x, rope, attend_fn, read_PR, attend_read_fn):
        """The final hidden states [P, R, D] of the tokens `read_PR` of x [P, T, D] alone, over stacked layers, and what
        `attend_fn` returns beside its output, a list of L. The last layer, whose attention is `attend_read_fn`, works
        out nothing but keys and values of the other tokens."""
        last = self.arch.layers - 1

        def block(i):
            return Block(self.arch, jax.tree.map(lambda w: w[i], self.layers))

        def step(x, i):
            x, cache = block(i)(x, rope, attend_fn, None)
            return constrain_batch(x), cache

        x, caches = jax.lax.scan(step, x, jnp.arange(last))
        x, cache = block(last)(x, rope, attend_read_fn, None, read_PR)
        return self.norm(x), [*(jax.tree.map(lambda a, i=i: a[i], caches) for i in range(last)), cache]


def tokens_at(values_PT, index_PR):
    """`values` [P, T, ...] at R tokens of each row: [P, R, ...]."""
    return jnp.take_along_axis(values_PT, index_PR.reshape(*index_PR.shape, *[1] * (values_PT.ndim - 2)), axis=1)


def head_matrix(arch: Arch, params: dict) -> jax.Array:
    """[D, V], the matrix that turns final hidden states into logits."""
    return params["embed"].T if arch.tied_embeddings else params["lm_head"]


def next_logits(arch: Arch, params: dict, hidden_RD: jax.Array) -> jax.Array:
    """float32 logits [V, R]: `logits_of`, vocabulary first, from the embedding as it lies where it is the head. It is
    the left factor (see `matmul_turned`), and neither the embedding nor the logits are turned over."""
    head, axis = (params["embed"], 1) if arch.tied_embeddings else (params["lm_head"], 0)
    contracted = (((axis,), (1,)), ((), ()))
    return jax.lax.dot_general(head.astype(hidden_RD.dtype), hidden_RD, contracted, preferred_element_type=jnp.float32)


def logits_of(hidden: jax.Array, head_DV: jax.Array) -> jax.Array:
    """float32 logits [..., V] of final hidden states [..., D]."""
    return matmul(hidden, head_DV.astype(hidden.dtype), jnp.float32)


def rope_tables(positions: jax.Array, arch: Arch):
    """(cos, sin), float32 [..., 1, H / 2], of int positions [...]."""
    half = arch.head_dim // 2
    inverse = arch.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * inverse
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x, rope):
    """Rotary embedding of x [..., heads, H] in the half-split form of Hugging Face checkpoints."""
    cos, sin = (t.astype(x.dtype) for t in rope)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _packed_attention(arch: Arch) -> Callable:
    """`attention.attend_packed`, or the kernel in its place."""
    if arch.attention == "plain":
        return attend_packed
    if arch.attention == "splash":  # of either only its platform has a use
        from cz_jax.models import splash as kernel
    else:
        from cz_jax.models import cudnn as kernel
    return kernel.attend_packed


def shared_forward(
    arch: Arch,
    params: dict,
    prompts_PT,
    prompt_lengths_P,
    suffixes_PGT,
    dtype=jnp.float32,
    remat: Remat | None = None,
):
    """Final hidden states of prompts (right-padded, int [P, Tp]) and of their suffixes (int [P, G, Ts]).

    Every prompt is computed once; a suffix token sees its prompt and the earlier tokens of its own suffix, never
    another row. Padding behind a suffix is never seen by what stands before it. Returns (prompt [P, Tp, D], suffix [P,
    G, Ts, D]).
    """
    (p, tp), (_, g, ts) = prompts_PT.shape, suffixes_PGT.shape
    model, packed = Qwen(arch, params), _pack(arch, prompts_PT, prompt_lengths_P, suffixes_PGT)
    hidden, _ = model.run(model.embed_tokens(packed.tokens, dtype), packed.rope, packed.attend_fn, remat=remat)
    return hidden[:, :tp], hidden[:, tp:].reshape(p, g, ts, -1)


def last_hidden(
    arch: Arch, params: dict, prompts_PT, prompt_lengths_P, suffixes_PGT, suffix_lengths_PG, dtype=jnp.float32
):
    """[P, G, D]: what `shared_forward` gives for the last token of each suffix, which holds one at least."""
    (p, tp), (_, g, ts) = prompts_PT.shape, suffixes_PGT.shape
    model, packed = Qwen(arch, params), _pack(arch, prompts_PT, prompt_lengths_P, suffixes_PGT)
    own = jnp.arange(ts) < suffix_lengths_PG[..., None]  # P G Ts
    own = own[:, :, None] & jnp.eye(g, dtype=bool)[..., None]  # P G (row) G (of the suffix) Ts
    shared = jnp.broadcast_to((jnp.arange(tp) < prompt_lengths_P[:, None])[:, None], (p, g, tp))
    seen = jnp.concatenate([shared, own.reshape(p, g, g * ts)], axis=2)

    def attend_read_fn(q, k, v, _):
        return attend_few(q, k, v, seen), None

    last = tp + jnp.arange(g) * ts + suffix_lengths_PG - 1
    x = model.embed_tokens(packed.tokens, dtype)
    hidden, _ = model.read(x, packed.rope, packed.attend_fn, last, attend_read_fn)
    return hidden


class _Packed(NamedTuple):
    tokens: jax.Array  # int [P, Tp + G * Ts]: a prompt and its suffixes, one behind the other
    rope: tuple
    attend_fn: Callable


def _pack(arch: Arch, prompts_PT, prompt_lengths_P, suffixes_PGT) -> _Packed:
    (p, tp), (_, g, ts) = prompts_PT.shape, suffixes_PGT.shape
    at_prompt = jnp.broadcast_to(jnp.arange(tp), (p, tp))
    at_suffix = prompt_lengths_P[:, None, None] + jnp.broadcast_to(jnp.arange(ts), (p, g, ts))
    attend = _packed_attention(arch)

    def attend_fn(q, k, v, _):
        return attend(q, k, v, prompt_lengths_P, g, ts), None

    return _Packed(
        jnp.concatenate([prompts_PT, suffixes_PGT.reshape(p, g * ts)], axis=1),
        rope_tables(jnp.concatenate([at_prompt, at_suffix.reshape(p, g * ts)], axis=1), arch),
        attend_fn,
    )


def predicting_hidden(prompt_PTD, prompt_lengths_P, suffix_PGTD):
    """[P, G, Ts, D]: for each suffix token the hidden state that predicts it: the prompt's last real one for the
    first."""
    g = suffix_PGTD.shape[1]
    last = tokens_at(prompt_PTD, (prompt_lengths_P - 1)[:, None])  # P 1 D
    first = jnp.broadcast_to(last[:, None], (last.shape[0], g, 1, last.shape[-1]))
    return jnp.concatenate([first, suffix_PGTD[:, :, :-1]], axis=2)


class PromptCache(NamedTuple):
    """For each layer the keys [P, K, H, Tp] and values [P, K, Tp, H] of P prompts."""

    keys: tuple
    values: tuple


def prefill(arch: Arch, params: dict, prompts_PT, prompt_lengths_P, dtype=jnp.float32):
    """(hidden state that predicts the first new token [P, D], PromptCache) of right-padded prompts (int [P, Tp])."""
    model, attend = Qwen(arch, params), _packed_attention(arch)
    last = (prompt_lengths_P - 1)[:, None]
    positions = jnp.broadcast_to(jnp.arange(prompts_PT.shape[1]), prompts_PT.shape)
    seen = (positions <= last)[:, None]

    def keeping(attend):
        return lambda q, k, v, _: (attend(q, k, v), (jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2)))

    hidden, caches = model.read(
        model.embed_tokens(prompts_PT, dtype), rope_tables(positions, arch),
        keeping(lambda q, k, v: attend(q, k, v, prompt_lengths_P, 0, 0)),
        last, keeping(lambda q, k, v: attend_few(q, k, v, seen)),
    )  # fmt: skip
    return hidden[:, 0], PromptCache(*(tuple(a) for a in zip(*caches, strict=True)))


def for_decoding(arch: Arch, params: dict, positions: int) -> dict:
    """`params` as `decode` reads them, made once and outside of its loop: a tuple of L layers, kernels turned, and the
    tables of so many positions, which XLA on a CPU works out again for every head of every layer where it may."""

    def one(leaf):
        if not (isinstance(leaf, dict) and "kernel" in leaf):
            return leaf
        return {"turned": leaf["kernel"].T, **{name: a for name, a in leaf.items() if name != "kernel"}}

    layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(arch.layers)]
    return {
        **params,
        "layers": tuple({name: one(leaf) for name, leaf in layer.items()} for layer in layers),
        "rope": rope_tables(jnp.arange(positions), arch),
    }


def empty_suffix(arch: Arch, rows: int, length: int, dtype) -> tuple:
    """Per layer zeros for the keys [P * G, K, H, Ts] and the values [P * G, K, Ts, H] of so many rows. The axes of rows
    are one: with an axis of 1 among them, XLA on a CPU keeps a second cache, and copies both at every step."""
    heads, size = (rows, arch.kv_heads), arch.head_dim
    return tuple(
        (jnp.zeros((*heads, size, length), dtype), jnp.zeros((*heads, length, size), dtype)) for _ in range(arch.layers)
    )


def longer_suffix(suffix: tuple, length: int) -> tuple:
    """`suffix` with room for `length` tokens a row, the further ones zeros."""

    def pad(a, axis: int):
        return jnp.pad(a, [(0, length - size if i == axis else 0) for i, size in enumerate(a.shape)])

    return tuple((pad(keys, 3), pad(values, 2)) for keys, values in suffix)


def decode(
    arch: Arch, layered_params: dict, tokens_PG, positions_PG, column, seen, prompt: PromptCache, visible,
    suffix: tuple, seats: Seats | None = None,
):  # fmt: skip
    """One step: tokens (int [P, G]) at their positions behind the prompts, whose keys and values go into `column` (int
    scalar) of the suffix caches. `seen` (bool, broadcastable to [P * G, Ts]): the columns that they see, their own
    among them; `visible` (bool, broadcastable to [P, G, Tp]): the tokens of the prompts. With `seats` tokens are
    [W, S], S of each of W ways, and prompts [P, ...] as many to a way as it has places. Returns (hidden [P, G, D] that
    predicts the next token, the suffix caches)."""
    model = Qwen(arch, layered_params)

    def attend_fn(q, k, v, cache):
        (prompt_k, prompt_v), (own_k, own_v) = cache
        new_q, new_k, new_v = (a.reshape(-1, *a.shape[2:]) for a in (q, k, v))
        own_k = jax.lax.dynamic_update_slice_in_dim(own_k, new_k[..., None], column, axis=3)
        own_v = jax.lax.dynamic_update_slice_in_dim(own_v, new_v[:, :, None], column, axis=2)
        out = attend_cached(new_q, (prompt_k, prompt_v, visible), (own_k, own_v, seen), seats)
        return out.reshape(q.shape), (own_k, own_v)

    caches = tuple(zip(zip(prompt.keys, prompt.values, strict=True), suffix, strict=True))
    rope = [jnp.take(table, positions_PG, axis=0, mode="clip") for table in layered_params["rope"]]
    return model.run(model.embed_tokens(tokens_PG, prompt.keys[0].dtype), rope, attend_fn, caches)


def random_params(arch: Arch, seed: int, dtype=jnp.float32, sharding_of=None) -> dict:
    """Random weights (normal 0.02, biases 0, norms 1), made on the device in the shardings of `sharding_of(weight)`."""
    table = weights(arch)

    def make():
        key = jax.random.key(seed)
        fill = {"ones": jnp.ones, "zeros": jnp.zeros}

        def leaf(w):
            if w.init in fill:
                return fill[w.init](w.shape, dtype)
            return (0.02 * jax.random.normal(jax.random.fold_in(key, table.index(w)), w.shape, jnp.float32)).astype(
                dtype
            )

        return tree_of(table, leaf)

    shardings = None if sharding_of is None else tree_of(table, sharding_of)
    return jax.jit(make, out_shardings=shardings)()
