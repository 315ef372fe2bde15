"""Advantages and the GRPO loss against a float64 reference written by hand (tests/reference_grpo.py)."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_grpo import loss_and_gradient

from cz_jax.config import GrpoConfig
from cz_jax.grpo.advantages import advantages, has_signal
from cz_jax.grpo.loss import (
    Denominators,
    LossOptions,
    add_sums,
    denominators,
    finish_metrics,
    grpo_loss,
    loss_inputs,
    zero_sums,
)

P, G, T, MAX_TOKENS = 3, 4, 11, 16
# float32 against float64: about a hundred roundings of 2^-24 on numbers of one size.
TOLERANCE = 1e-5
LOSSES = ("token_mean", "sequence_mean", "dr_grpo")


def batch(seed=0, spread=0.4):
    """A ragged batch in float32 whose ratios fall on both sides of both clips, with one empty completion."""
    rng = np.random.default_rng(seed)
    new = -rng.exponential(1.0, (P, G, T)).astype(np.float32)
    near = lambda: (new + rng.normal(0, spread, new.shape)).astype(np.float32)  # noqa: E731
    lengths = rng.integers(1, T + 1, (P, G))
    lengths[0, 0], lengths[0, 1], lengths[1, 1] = T, 1, 0
    return {
        "new": new, "old": near(), "behaviour": near(), "reference": near(),
        "advantages": rng.normal(0, 1, (P, G)).astype(np.float32),
        "mask": np.arange(T) < lengths[..., None], "own": np.array([True, False, True]), "lengths": lengths,
    }  # fmt: skip


@functools.partial(jax.jit, static_argnames="options")
def run(new, old, behaviour, reference, advantages_PG, mask, over, options, own):
    """((loss, sums), gradient) of grpo_loss."""

    inputs = loss_inputs(old, behaviour, reference, advantages_PG, mask, over, options.loss, own)
    return jax.value_and_grad(grpo_loss, has_aux=True)(new, inputs, options)


def run_batch(b, options, over=None, rows=slice(None)):
    picked = [
        None if b[k] is None else b[k][rows] for k in ("new", "old", "behaviour", "reference", "advantages", "mask")
    ]
    over = denominators(b["lengths"], MAX_TOKENS) if over is None else over
    return run(*picked, over, options, b["own"][rows])


def assert_close(actual, wanted, tolerance=TOLERANCE):
    wanted = np.asarray(wanted, np.float64)
    np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance * max(np.abs(wanted).max(), 1e-30))


COMBINATIONS = list(itertools.product(LOSSES, (0.0, 0.07), (False, True), (False, True), ((0.2, 0.28), (0.1, 3.0))))


@pytest.mark.parametrize("loss,kl,with_old,with_weights,clips", COMBINATIONS)
def test_equals_the_float64_reference(loss, kl, with_old, with_weights, clips):
    b = batch(seed=len(loss) + 10 * with_old + 20 * with_weights)
    b["old"] = b["old"] if with_old else None
    b["behaviour"] = b["behaviour"] if with_weights else None
    b["reference"] = b["reference"] if kl else None
    options = LossOptions(loss, *clips, kl, importance_cap=1.3)
    (value, sums), gradient = run_batch(b, options)
    wanted, wanted_gradient, stats = loss_and_gradient(
        b["new"], b["old"], b["behaviour"], b["reference"], b["advantages"], b["mask"], b["own"], loss=loss,
        clip_low=clips[0], clip_high=clips[1], kl=kl, importance_cap=1.3, max_tokens=MAX_TOKENS,
    )  # fmt: skip
    assert value.dtype == gradient.dtype == jnp.float32
    assert_close(value, wanted)
    assert_close(gradient, wanted_gradient)
    check_metrics(finish_metrics(sums), stats, kl, with_old, with_weights)


def check_metrics(metrics, stats, kl, with_old, with_weights):
    n = stats["tokens"]
    wanted = {
        "tokens": n, "ratio_mean": stats["ratio"] / n, "policy_kl": stats["policy_kl"] / n,
        "clip_low_share": stats["low"] / n, "clip_high_share": stats["high"] / n,
    }  # fmt: skip
    if with_old:
        assert stats["low"] > 0, "the batch does not reach the lower clip"
    if kl:
        wanted["reference_kl"] = stats["reference_kl"] / n
    if with_weights:
        assert 0 < stats["truncated"] < stats["own_tokens"] < n
        own = stats["own_tokens"]
        wanted |= {
            "importance_weight_mean": stats["weight"] / own, "importance_truncated_share": stats["truncated"] / own,
            "logprob_difference_mean": stats["gap"] / own, "logprob_difference_max": stats["gap_max"],
        }  # fmt: skip
    assert metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        assert type(metrics[name]) is float
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_the_reference_gradient_is_the_slope_of_the_reference_loss():
    b, h = batch(3), 1e-6
    old = b["old"].astype(np.float64)
    options = {"loss": "sequence_mean", "clip_low": 0.2, "clip_high": 0.28, "kl": 0.1, "importance_cap": 1.3}

    def f(new):
        rest = (old, b["behaviour"], b["reference"], b["advantages"], b["mask"], b["own"])
        return loss_and_gradient(new, *rest, **options, max_tokens=MAX_TOKENS)

    new = b["new"].astype(np.float64)
    gradient = np.array(f(new)[1])
    for p, g, t in [(0, 0, 0), (0, 0, 5), (1, 0, 0), (2, 3, 0), (0, 1, 0), (1, 1, 2)]:
        step = np.zeros_like(new)
        step[p, g, t] = h
        assert (f(new + step)[0] - f(new - step)[0]) / (2 * h) == pytest.approx(gradient[p, g, t], abs=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_batch(loss):
    b, options = batch(4), LossOptions(loss, kl=0.05)
    (whole, whole_sums), whole_gradient = run_batch(b, options)
    over = denominators(b["lengths"], MAX_TOKENS)
    parts = [run_batch(b, options, over, slice(p, p + 1)) for p in range(P)]
    assert_close(sum(float(value) for (value, _), _ in parts), whole)
    assert_close(np.concatenate([gradient for _, gradient in parts]), whole_gradient)
    sums = functools.reduce(add_sums, [s for (_, s), _ in parts], zero_sums())
    assert finish_metrics(sums) == pytest.approx(finish_metrics(whole_sums), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("updates", ["first", "later"])
def test_dropping_groups_without_signal_changes_nothing(loss, updates):
    b, options = batch(5), LossOptions(loss)
    b["reference"] = None
    if updates == "first":
        b["old"] = None
    rewards = np.array([[0.2, 1.5, 0.3, 0.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 1.2]])
    b["advantages"], kept = advantages(rewards, divide_by_std=True), has_signal(rewards)
    assert kept.tolist() == [True, False, True]
    (whole, _), whole_gradient = run_batch(b, options)
    (dropped, _), gradient = run_batch(b, options, denominators(b["lengths"], MAX_TOKENS), kept)
    assert_close(dropped, whole, 1e-6)
    assert_close(gradient, np.asarray(whole_gradient)[kept], 1e-6)
    assert not np.asarray(whole_gradient)[1].any()


@pytest.mark.parametrize("garbage", [-np.inf, np.inf, np.nan, 1e30])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_stands_outside_of_the_mask_has_no_influence(loss, garbage):
    b, options = batch(6), LossOptions(loss, kl=0.05)
    b["mask"][2] = False  # a padding row, whose advantages are garbage as well
    b["lengths"] = b["mask"].sum(-1)
    clean = run_batch(b, options)
    for name in ("new", "old", "behaviour", "reference"):
        b[name] = np.where(b["mask"], b[name], np.float32(garbage))
    b["advantages"][2] = garbage
    dirty = run_batch(b, options)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert np.isfinite(dirty[1]).all() and not np.asarray(dirty[1])[~b["mask"]].any()


@pytest.mark.parametrize("name", ["new", "old", "behaviour", "reference", "advantages"])
@pytest.mark.parametrize("bad", [-np.inf, np.nan])
def test_a_number_that_is_not_finite_inside_of_the_mask_makes_the_loss_nan(name, bad):
    b, options = batch(7), LossOptions(kl=0.05)
    b[name].flat[0] = bad
    assert b["mask"].flat[0] and b["own"][0]
    (value, _), _ = run_batch(b, options)
    assert np.isnan(value)


def test_a_policy_that_ran_away_gives_finite_numbers():
    b = batch(8)
    b["old"], b["behaviour"], b["reference"] = b["new"] - 300.0, b["new"] + 300.0, b["new"] + 300.0
    (value, sums), gradient = run_batch(b, LossOptions(kl=0.05))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert all(math.isfinite(v) for v in finish_metrics(sums).values())


def test_the_behaviour_of_a_peer_is_not_used():
    b = batch(9)
    first = run_batch(b, LossOptions())
    b["behaviour"][1] = np.nan  # own[1] is False
    jax.tree.map(np.testing.assert_array_equal, first, run_batch(b, LossOptions()))


def test_without_own_every_group_is_our_own():
    b = batch(10)
    b["own"] = np.ones(P, bool)
    said = run_batch(b, LossOptions())
    arguments = [b[k] for k in ("new", "old", "behaviour", "reference", "advantages", "mask")]
    unsaid = run(*arguments, denominators(b["lengths"], MAX_TOKENS), LossOptions(), None)
    jax.tree.map(np.testing.assert_array_equal, said, unsaid)


def test_cap_zero_measures_the_sampler_but_does_not_weigh():
    b = batch(11)
    (value, sums), gradient = run_batch(b, LossOptions(importance_cap=0.0))
    metrics = finish_metrics(sums)
    assert metrics["logprob_difference_max"] > 0 and "importance_weight_mean" not in metrics
    b["behaviour"] = None
    (plain, _), plain_gradient = run_batch(b, LossOptions())
    np.testing.assert_array_equal(value, plain)
    np.testing.assert_array_equal(gradient, plain_gradient)


def test_bfloat16_logprobs_are_summed_in_float32():
    b = batch(12)
    half = {k: jnp.asarray(b[k], jnp.bfloat16) for k in ("new", "old", "behaviour", "reference")}
    (value, _), gradient = run_batch(b | half, LossOptions(kl=0.05))
    (wanted, _), _ = run_batch(b | {k: v.astype(jnp.float32) for k, v in half.items()}, LossOptions(kl=0.05))
    assert value == wanted and gradient.dtype == jnp.bfloat16


def test_new_counts_compile_nothing_anew():
    b = batch(13)
    run_batch(b, LossOptions(), Denominators(5.0, 6.0, 7.0))
    compiled = run._cache_size()
    run_batch(b, LossOptions(), Denominators(15.0, 16.0, 17.0))
    assert run._cache_size() == compiled


def test_options_and_denominators_refuse_nonsense():
    config = GrpoConfig()
    assert (
        LossOptions(config.loss, config.clip_low, config.clip_high, config.kl, config.importance_cap) == LossOptions()
    )
    with pytest.raises(ValueError, match="token_mean"):
        LossOptions("mean")
    with pytest.raises(ValueError, match="nothing to train on"):
        denominators(np.zeros((2, 2), int), 8)
    with pytest.raises(ValueError, match="reference log-prob"):
        run_batch(batch() | {"reference": None}, LossOptions(kl=0.1))
    assert denominators([[3, 0], [5, 2]], 8) == Denominators(10.0, 4.0, 8.0)


def test_advantages_use_the_unbiased_standard_deviation():
    assert advantages([[0.0, 1.0]], True)[0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], abs=1e-6)
    rewards = [[1.0, 0.0, 0.0, 1.0], [1.2, -0.2, 0.8, 0.2]]
    wanted = [
        [(r - 0.5) / std for r in row] for row, std in zip(rewards, (math.sqrt(1 / 3), 0.6218252702), strict=True)
    ]
    assert_close(advantages(rewards, True), wanted, 1e-6)
    assert_close(advantages(rewards, False), [[r - 0.5 for r in row] for row in rewards], 1e-6)
    assert advantages(rewards, True).dtype == np.float32


def test_advantages_equal_torch(torch):
    rewards = np.random.default_rng(0).normal(size=(5, 8))
    r = torch.tensor(rewards)
    wanted = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-8)
    assert_close(advantages(rewards, True), wanted.numpy(), 1e-6)


def test_a_group_without_signal_has_zero_advantages():
    rewards = [[0.3, 0.1 + 0.2, 0.3], [1.0, 1.0 + 5e-7, 1.0], [1.0, 1.0 + 2e-6, 1.0]]
    assert has_signal(rewards).tolist() == [False, False, True]
    for divide in (True, False):
        assert advantages(rewards, divide)[:2].tolist() == [[0.0] * 3] * 2
        assert advantages(rewards, divide)[2].any()


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(0.5, 3), st.floats(-2, 2))
def test_advantages_do_not_depend_on_scale_or_offset(row, scale, offset):
    row = np.round(row, 2)  # differences are 0 or well above the threshold of equality
    a, b = advantages([row], True), advantages([row * scale + offset], True)
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert abs(a.sum()) < 1e-5


@pytest.mark.parametrize("bad", [[[1.0, np.nan]], [[np.inf, 0.0]], [[1e308, 0.0]], [1.0, 0.0], [[1.0]], [[[1.0, 0.0]]]])
def test_rewards_that_are_no_rewards_are_refused(bad):
    for function in (has_signal, lambda r: advantages(r, True)):
        with pytest.raises(ValueError, match="reward"):
            function(bad)
