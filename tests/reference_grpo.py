"""The GRPO loss and its gradient written out token by token in float64, with plain loops and by hand.

Shares nothing with `cz_jax`: the formulas are those at the head of cz_jax/grpo/loss.py, the derivative is worked out
here.
"""

import math


def loss_and_gradient(
    new, old, behaviour, reference, advantages, mask, own, *, loss, clip_low, clip_high, kl, importance_cap, max_tokens
):
    """(loss, d loss / d new as nested lists, statistics). All arguments are nested lists or arrays [P][G][T],
    advantages [P][G], own [P]; old, behaviour and reference may be None; denominators are those of this batch."""
    P, G, T = len(new), len(new[0]), len(new[0][0])
    sequences = P * G
    tokens = sum(bool(mask[p][g][t]) for p in range(P) for g in range(G) for t in range(T))
    total, gradient = 0.0, [[[0.0] * T for _ in range(G)] for _ in range(P)]
    stats = dict.fromkeys(
        ("tokens", "ratio", "low", "high", "policy_kl", "reference_kl", "weight", "truncated", "gap"), 0.0
    )
    stats["own_tokens"], stats["gap_max"] = 0, 0.0
    for p in range(P):
        for g in range(G):
            length = sum(bool(m) for m in mask[p][g])
            if loss == "token_mean":
                share = 1.0 / tokens
            elif loss == "sequence_mean":
                share = 1.0 / (length * sequences) if length else 0.0
            else:
                share = 1.0 / (sequences * max_tokens)
            A = float(advantages[p][g])
            for t in range(T):
                if not mask[p][g][t]:
                    continue
                n = float(new[p][g][t])
                o = n if old is None else float(old[p][g][t])
                value, slope = _surrogate(math.exp(n - o), A, clip_low, clip_high, stats)
                stats["policy_kl"] += math.exp(n - o) - (n - o) - 1.0
                weight = 1.0
                if behaviour is not None and own[p]:
                    b = float(behaviour[p][g][t])
                    stats["own_tokens"] += 1
                    stats["gap"] += abs(o - b)
                    stats["gap_max"] = max(stats["gap_max"], abs(o - b))
                    if importance_cap > 0:
                        weight = min(math.exp(o - b), importance_cap)
                        stats["weight"] += weight
                        stats["truncated"] += math.exp(o - b) > importance_cap
                token_loss, token_slope = -weight * value, -weight * slope
                if reference is not None:
                    d = float(reference[p][g][t]) - n
                    stats["reference_kl"] += math.exp(d) - d - 1.0
                    token_loss += kl * (math.exp(d) - d - 1.0)
                    token_slope += kl * (1.0 - math.exp(d))
                total += share * token_loss
                gradient[p][g][t] = share * token_slope
    return total, gradient, stats


def _surrogate(r, A, clip_low, clip_high, stats):
    """min(r A, clip(r) A) and its derivative with respect to log r."""
    stats["tokens"] += 1
    stats["ratio"] += r
    if A > 0 and r > 1.0 + clip_high:
        stats["high"] += 1
        return (1.0 + clip_high) * A, 0.0
    if A < 0 and r < 1.0 - clip_low:
        stats["low"] += 1
        return (1.0 - clip_low) * A, 0.0
    return r * A, r * A
