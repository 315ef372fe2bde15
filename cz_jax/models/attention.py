"""Attention in plain jax.numpy: softmax in float32, grouped query heads.

Legend: B rows, P prompts, G rows of a prompt, T queries, S keys, N query heads, K key/value heads, R = N / K, H head
size.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from cz_jax.errors import ConfigError
from cz_jax.parallel import LOGICAL_AXES, batch_devices

KEPT = "product"  # the name of what a backward pass may keep: see models.qwen
KERNELS = {"splash": "tpu", "cudnn": "gpu"}  # and the JAX platform of each
MASKED = -1e30  # finite, so that a query that sees no key gives numbers (which are masked later) and not NaN
PIECES, PIECE_TOKENS = 4, 128  # of a row's queries: at most so many pieces, of so many tokens at least


def implementation(asked: str, platform: str) -> str:
    """What `run.attention` means on a JAX platform: "plain", this module, or a kernel, "splash" of models.splash or
    "cudnn" of models.cudnn. ConfigError where the platform has no such kernel."""
    if asked == "auto":
        return "splash" if platform == "tpu" else "plain"
    wanted = KERNELS.get(asked, platform)
    if wanted != platform:
        raise ConfigError(
            f"run.attention={asked} is a kernel for {wanted.upper()}s, and this is a {platform}",
            fix="run.attention=auto",
        )
    return asked


def on_each_device(attend: Callable, q_PTNH, k_PTKH, v_PTKH, lengths_P) -> jax.Array:
    """`attend` of a kernel. Under a mesh every device has its own prompts, and its own heads where they divide."""
    heads, kv_heads = q_PTNH.shape[2], k_PTKH.shape[2]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q_PTNH, k_PTKH, v_PTKH, lengths_P)
    batch, tensor = LOGICAL_AXES["batch"], LOGICAL_AXES["heads"]
    rows = batch if len(q_PTNH) % batch_devices(mesh) == 0 else None
    split = tensor if heads % mesh.shape[tensor] == 0 and kv_heads % mesh.shape[tensor] == 0 else None
    spec = PartitionSpec(rows, None, split, None)
    # A kernel's result does not say over which axes it differs, so that this cannot be checked (check_vma).
    sharded = jax.shard_map(attend, in_specs=(spec, spec, spec, PartitionSpec(rows)), out_specs=spec, check_vma=False)
    return sharded(q_PTNH, k_PTKH, v_PTKH, lengths_P)


class Seats(NamedTuple):
    """Which prompt each row of a call reads, where that is not told by its place. A way's prompts have a number of
    seats each, one behind the other; W ways, S rows of each."""

    of_row: jax.Array  # int [W, S]: the seat of a row
    rows: jax.Array  # int [W, seats]: the row in a seat; any, where it is empty


def rows_of(x, numbers_WS) -> jax.Array:
    """Of x [W * R, ...], R rows of each of W ways, those with these numbers in each way. [W * S, ...]"""
    by_way = x.reshape(len(numbers_WS), -1, *x.shape[1:])
    return jax.vmap(lambda x, i: x[i])(by_way, numbers_WS).reshape(-1, *x.shape[1:])


def attend_cached(q_BNH: jax.Array, prompt, own, seats: Seats | None = None) -> jax.Array:
    """Attention of one token of each row over caches: that of a prompt, which rows share and which is read once for all
    of them, and the row's own; one softmax. [B, N, H] in the dtype of v.

    prompt: (k [P, K, H, S], v [P, K, S, H], mask broadcastable to [P, G, S]) of P prompts with G seats each, in which
    rows sit in order where `seats` does not say otherwise. own: (k [B, K, H, S'], v [B, K, S', H], mask broadcastable
    to [B, S']). In this order of axes no product has to turn a cache over first.
    """
    kp, vp, prompt_mask = prompt
    ko, vo, own_mask = own
    places, heads, h, tokens = kp.shape
    scale = h**-0.5
    q = q_BNH.reshape(len(q_BNH), heads, -1, h)

    def seated(x):  # [B, K, ...] -> [P, K, G, ...]
        x = x if seats is None else rows_of(x, seats.rows)
        return jnp.swapaxes(x.reshape(places, -1, *x.shape[1:]), 1, 2)

    def by_row(x):
        x = jnp.swapaxes(x, 1, 2)
        x = x.reshape(-1, *x.shape[2:])
        return x if seats is None else rows_of(x, seats.of_row)

    folded = seated(q)  # p k g r h
    shape = folded.shape[:-1]
    folded = folded.reshape(places, heads, -1, h)  # rows that share a prompt are one product
    sp = jnp.einsum("pkqh,pkhs->pkqs", folded, kp, preferred_element_type=jnp.float32).reshape(*shape, tokens) * scale
    so = jnp.einsum("bkrh,bkhs->bkrs", q, ko, preferred_element_type=jnp.float32) * scale
    sp = jnp.where(jnp.broadcast_to(prompt_mask, (places, shape[2], tokens))[:, None, :, None], sp, MASKED)
    so = jnp.where(jnp.broadcast_to(own_mask, (len(q), so.shape[-1]))[:, None, None], so, MASKED)
    top = jnp.maximum(by_row(sp.max(-1)), so.max(-1))  # b k r
    ep, eo = jnp.exp(sp - seated(top)[..., None]), jnp.exp(so - top[..., None])
    weights = ep.astype(vp.dtype).reshape(places, heads, -1, tokens)
    out = jnp.einsum("pkqs,pksh->pkqh", weights, vp, preferred_element_type=jnp.float32).reshape(*shape, h)
    own_out = jnp.einsum("bkrs,bksh->bkrh", eo.astype(vo.dtype), vo, preferred_element_type=jnp.float32)
    total = by_row(ep.sum(-1)) + eo.sum(-1)
    return ((by_row(out) + own_out) / total[..., None]).astype(vo.dtype).reshape(q_BNH.shape)


def attend_packed(q_PTNH, k_PTKH, v_PTKH, lengths_P, suffixes: int, suffix_tokens: int) -> jax.Array:
    """Attention of right-padded prompts and, behind each, of its suffixes, one behind the other: a prompt's token sees
    the earlier ones, a suffix's token the prompt and the earlier ones of its own suffix. [P, T, N, H] in the dtype of
    v, meaningless where a prompt is padding."""
    p, positions, heads, h = k_PTKH.shape
    prompt = positions - suffixes * suffix_tokens

    def heads_first(a, rows: int):  # [P, K, G, R, T, H], the order of all products, which turn no scores over then
        return jnp.transpose(a.reshape(p, rows, -1, heads, a.shape[2] // heads, h), (0, 3, 1, 4, 2, 5))

    def of_rows(part: slice, rows: int):
        q, k, v = (heads_first(a[:, part], rows) for a in (q_PTNH, k_PTKH, v_PTKH))
        return q, k[:, :, :, 0], v[:, :, :, 0]

    def tokens_first(out):
        return jnp.transpose(out, (0, 2, 4, 1, 3, 5)).reshape(p, -1, *q_PTNH.shape[2:])

    q, k, v = of_rows(slice(prompt), 1)
    out = tokens_first(_attend_earlier(q, k, v))
    if suffixes:
        visible = jnp.arange(prompt) < lengths_P[:, None]
        prefix = k[:, :, 0], v[:, :, 0], visible[:, None, None, None, None]
        behind = _attend_earlier(*of_rows(slice(prompt, None), suffixes), prefix)
        out = jnp.concatenate([out, tokens_first(behind)], axis=1)
    return checkpoint_name(out, KEPT)


def attend_few(q_PRNH: jax.Array, k_PTKH, v_PTKH, mask_PRT) -> jax.Array:
    """Attention of R tokens of each row to those of its T tokens that `mask_PRT` names. [P, R, N, H] in the dtype of
    q."""
    p, r, n, h = q_PRNH.shape
    heads = k_PTKH.shape[2]
    q_PKGRTH = jnp.transpose(q_PRNH.reshape(p, r, heads, -1, 1, h), (0, 2, 1, 3, 4, 5))
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k_PTKH, v_PTKH))
    out = _attend(q_PKGRTH, (k, v, mask_PRT[:, None, :, None, None]))
    return jnp.swapaxes(out, 1, 2).reshape(p, r, n, h)


def _attend_earlier(q_PKGRTH, k_PKGTH, v_PKGTH, *prefix) -> jax.Array:
    """`_attend` to `prefix` and to the tokens of the own row up to the query's own. Queries are taken a piece of a row
    at a time, so that scores behind its last are not worked out."""
    tokens = k_PKGTH.shape[3]
    width = max(PIECE_TOKENS, -(-tokens // PIECES))
    out = []
    for start in range(0, tokens, width):
        end = min(start + width, tokens)
        seen = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        own = k_PKGTH[..., :end, :], v_PKGTH[..., :end, :], seen
        out.append(_attend(q_PKGRTH[..., start:end, :], *prefix, own))
    return jnp.concatenate(out, axis=-2)


def _attend(q_PKGRTH, *parts) -> jax.Array:
    """One softmax over the keys of all parts: (k, v, mask broadcastable to [P, K, G, R, T, S]), where k and v are the
    rows' own, [P, K, G, S, H], or shared, [P, K, S, H], and then read once. [P, K, G, R, T, H] in the dtype of q."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = []
    for k, _, mask in parts:
        equation = "pkgrth,pksh->pkgrts" if k.ndim == 4 else "pkgrth,pkgsh->pkgrts"
        scores.append(jnp.where(mask, product(equation, q_PKGRTH, k) * k.shape[-1] ** -0.5, MASKED))
    top = jax.lax.stop_gradient(reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores]))
    out = total = 0.0
    for (_, v, mask), s in zip(parts, scores, strict=True):
        # exp is 0 where the mask is False. Without this XLA on a CPU makes one library call of exp and product, whose
        # buffers are not in its plan of the program's memory.
        weights = jnp.where(mask, jnp.exp(s - top), 0.0)
        equation = "pkgrts,pksh->pkgrth" if v.ndim == 4 else "pkgrts,pkgsh->pkgrth"
        out += product(equation, weights.astype(v.dtype), v)
        total += weights.sum(-1, keepdims=True)
    return (out / total).astype(q_PKGRTH.dtype)
