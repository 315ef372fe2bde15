"""Attention in plain jax.numpy: softmax in float32, grouped query heads.

Legend: B rows, P prompts, G rows of a prompt, T queries, S keys, N query heads, K key/value heads, R = N / K, H head
size.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cz_jax.errors import ConfigError

KEPT = "product"  # the name of what a backward pass may keep: see models.qwen
MASKED = -1e30  # finite, so that a query that sees no key gives numbers (which are masked later) and not NaN


def implementation(asked: str, platform: str) -> str:
    """What `run.attention` means on a JAX platform: "plain", this module, or "splash", the kernel of models.splash.
    ConfigError where the platform has no such kernel."""
    if asked == "auto":
        return "splash" if platform == "tpu" else "plain"
    if asked == "splash" and platform != "tpu":
        raise ConfigError(
            f"run.attention=splash is a kernel for TPUs, and this is a {platform}", fix="run.attention=auto"
        )
    return asked


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_TS: jax.Array) -> jax.Array:
    """Softmax attention; mask [T, S] (True: may be seen). Returns [B, T, N, H] in the dtype of v."""
    *lead, n, h = q_BTNH.shape
    q = q_BTNH.reshape(*lead, k_BSKH.shape[-2], -1, h)
    scores = jnp.einsum("btkrh,bskh->bkrts", q, k_BSKH, preferred_element_type=jnp.float32) * h**-0.5
    weights = jax.nn.softmax(jnp.where(mask_TS, scores, MASKED), axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("bkrts,bskh->btkrh", weights, v_BSKH, preferred_element_type=jnp.float32)
    return out.astype(v_BSKH.dtype).reshape(q_BTNH.shape)


def attend_shared(q_PGTNH: jax.Array, prefix, own) -> jax.Array:
    """Attention of G rows of each prompt over the prompt's keys and, behind them, each row's own keys: one softmax.

    prefix: (k, v [P, S, K, H], mask [P, S]); own: (k, v [P, G, S', K, H], mask broadcastable to [P, G, T, S']). The
    prefix is read once for all G rows: they are folded into the query axis.
    """
    p, g, t, n, h = q_PGTNH.shape
    kp, vp, prefix_mask = prefix
    ko, vo, own_mask = own
    k_heads = kp.shape[-2]
    q = q_PGTNH.reshape(p, g, t, k_heads, n // k_heads, h)
    scale = h**-0.5
    sp = jnp.einsum("pgtkrh,pskh->pkrgts", q, kp, preferred_element_type=jnp.float32) * scale
    so = jnp.einsum("pgtkrh,pgskh->pkrgts", q, ko, preferred_element_type=jnp.float32) * scale
    sp = jnp.where(prefix_mask[:, None, None, None, None, :], sp, MASKED)
    so = jnp.where(jnp.broadcast_to(own_mask, (p, g, t, ko.shape[2]))[:, None, None], so, MASKED)
    top = jax.lax.stop_gradient(jnp.maximum(sp.max(-1), so.max(-1))[..., None])
    ep, eo = jnp.exp(sp - top), jnp.exp(so - top)
    out = jnp.einsum("pkrgts,pskh->pgtkrh", ep.astype(vp.dtype), vp, preferred_element_type=jnp.float32)
    out += jnp.einsum("pkrgts,pgskh->pgtkrh", eo.astype(vo.dtype), vo, preferred_element_type=jnp.float32)
    total = jnp.moveaxis(ep.sum(-1) + eo.sum(-1), (1, 2), (3, 4))[..., None]  # p g t k r 1
    return (out / total).astype(vo.dtype).reshape(q_PGTNH.shape)


def attend_cached(q_PGNH: jax.Array, prompt, own) -> jax.Array:
    """Attention of one token of each of G rows of a prompt over caches: the prompt's, which is read once for all rows,
    and the row's own; one softmax. [P, G, N, H] in the dtype of v.

    prompt: (k [P, K, H, S], v [P, K, S, H], mask broadcastable to [P, G, S]); own: (k [P * G, K, H, S'], v [P * G, K,
    S', H], mask broadcastable to [P * G, S']). In this order of axes no product has to turn a cache over first.
    """
    p, g, n, h = q_PGNH.shape
    kp, vp, prompt_mask = prompt
    ko, vo, own_mask = own
    heads = kp.shape[1]
    q, scale = q_PGNH.reshape(p, g, heads, -1, h), h**-0.5
    sp = jnp.einsum("pgkrh,pkhs->pkgrs", q, kp, preferred_element_type=jnp.float32) * scale
    so = jnp.einsum("bkrh,bkhs->bkrs", q.reshape(-1, *q.shape[2:]), ko, preferred_element_type=jnp.float32) * scale
    sp = jnp.where(jnp.broadcast_to(prompt_mask, (p, g, sp.shape[-1]))[:, None, :, None], sp, MASKED)
    so = jnp.where(jnp.broadcast_to(own_mask, (p * g, so.shape[-1]))[:, None, None], so, MASKED)

    def by_row(x_PKGR):
        return jnp.swapaxes(x_PKGR, 1, 2).reshape(p * g, heads, -1)

    top = jnp.maximum(by_row(sp.max(-1)), so.max(-1))  # b k r
    ep = jnp.exp(sp - jnp.swapaxes(top.reshape(p, g, heads, -1), 1, 2)[..., None])
    eo = jnp.exp(so - top[..., None])
    out = jnp.einsum("pkgrs,pksh->pgkrh", ep.astype(vp.dtype), vp, preferred_element_type=jnp.float32).reshape(q.shape)
    own_out = jnp.einsum("bkrs,bksh->bkrh", eo.astype(vo.dtype), vo, preferred_element_type=jnp.float32)
    total = by_row(ep.sum(-1)) + eo.sum(-1)
    return ((out.reshape(own_out.shape) + own_out) / total[..., None]).astype(vo.dtype).reshape(p, g, n, h)


def attend_packed(q_PTNH, k_PTKH, v_PTKH, lengths_P, suffixes: int, suffix_tokens: int) -> jax.Array:
    """Attention of right-padded prompts and, behind each, of its suffixes, one behind the other: a prompt's token sees
    the earlier ones, a suffix's token the prompt and the earlier ones of its own suffix. [P, T, N, H] in the dtype of
    v, meaningless where a prompt is padding."""
    p, positions = q_PTNH.shape[:2]
    prompt = positions - suffixes * suffix_tokens

    def cut(a):
        return a[:, :prompt], a[:, prompt:].reshape(p, suffixes, suffix_tokens, *a.shape[2:])

    (qp, qs), (kp, ks), (vp, vs) = cut(q_PTNH), cut(k_PTKH), cut(v_PTKH)
    out = attend(qp, kp, vp, causal(prompt))
    if suffixes:
        visible = jnp.arange(prompt) < lengths_P[:, None]
        behind = attend_shared(qs, (kp, vp, visible), (ks, vs, causal(suffix_tokens)))
        out = jnp.concatenate([out, behind.reshape(p, suffixes * suffix_tokens, *behind.shape[3:])], axis=1)
    return checkpoint_name(out, KEPT)


def causal(length: int) -> jax.Array:
    """bool [T, T]: query t sees keys 0..t."""
    return jnp.tril(jnp.ones((length, length), bool))
