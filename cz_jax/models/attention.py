"""Attention in plain jax.numpy: softmax in float32, grouped query heads.

Legend: B rows, P prompts, G rows of a prompt, M prompts side by side, T queries, S keys, N query heads, K key/value
heads, R = N / K, H head size.
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
    """Attention of one token of each of G rows over caches: that of the prompt, which rows share and which is read once
    for all of them, and the row's own; one softmax. [P, G, N, H] in the dtype of v.

    prompt: (k [P, K, H, M * S], v [P, K, S, M * H], mask broadcastable to [P, G, S], place) of M prompts side by side,
    of which `place` (int [P, G]; None where M is 1) is the row's. own: (k [P * G, K, H, S'], v [P * G, K, S', H], mask
    broadcastable to [P * G, S']). In this order of axes no product has to turn a cache over first.
    """
    p, g, n, h = q_PGNH.shape
    kp, vp, prompt_mask, place = prompt
    ko, vo, own_mask = own
    heads, tokens, scale = kp.shape[1], vp.shape[2], h**-0.5
    q = q_PGNH.reshape(p, g, heads, -1, h)
    folded = jnp.swapaxes(q, 1, 2).reshape(p, heads, -1, h)  # rows that share a prompt are one product

    def in_place(x, size: int):  # p k g r size, from [P, K, G * R, M * size]
        x = x.reshape(p, heads, g, -1, x.shape[-1] // size, size)
        chosen = x[..., 0, :]
        for m in range(1, x.shape[-2]):
            chosen = jnp.where((place == m)[:, None, :, None, None], x[..., m, :], chosen)
        return chosen

    def by_row(x):  # [P, K, G, ...] -> [P * G, K, ...]
        return jnp.swapaxes(x, 1, 2).reshape(p * g, heads, *x.shape[3:])

    def by_prompt(x):
        return jnp.swapaxes(x.reshape(p, g, *x.shape[1:]), 1, 2)

    sp = in_place(jnp.einsum("pkqh,pkhs->pkqs", folded, kp, preferred_element_type=jnp.float32), tokens) * scale
    so = jnp.einsum("bkrh,bkhs->bkrs", q.reshape(-1, *q.shape[2:]), ko, preferred_element_type=jnp.float32) * scale
    sp = jnp.where(jnp.broadcast_to(prompt_mask, (p, g, tokens))[:, None, :, None], sp, MASKED)
    so = jnp.where(jnp.broadcast_to(own_mask, (p * g, so.shape[-1]))[:, None, None], so, MASKED)
    top = jnp.maximum(by_row(sp.max(-1)), so.max(-1))  # b k r
    ep, eo = jnp.exp(sp - by_prompt(top)[..., None]), jnp.exp(so - top[..., None])
    weights = ep.astype(vp.dtype).reshape(*folded.shape[:-1], tokens)
    out = in_place(jnp.einsum("pkqs,pksh->pkqh", weights, vp, preferred_element_type=jnp.float32), h)
    own_out = jnp.einsum("bkrs,bksh->bkrh", eo.astype(vo.dtype), vo, preferred_element_type=jnp.float32)
    total = by_row(ep.sum(-1)) + eo.sum(-1)
    return ((by_row(out) + own_out) / total[..., None]).astype(vo.dtype).reshape(p, g, n, h)


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
