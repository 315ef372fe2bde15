"""AdamW: against torch and a float64 AdamW written here, its schedules, and rounding to bfloat16 without bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cz_jax.config import OptimizerConfig
from cz_jax.grpo.optimizer import apply_updates, is_decayed, learning_rate_at, make_optimizer

STEPS = 10


def make_params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), dtype)  # noqa: E731
    return {
        "embed": normal(16, 8),
        "layers": {"attn_norm": normal(2, 8), "q": {"kernel": normal(2, 8, 8), "bias": normal(2, 8)}},
        "norm": normal(8),
    }


def gradients_at(step, params, dtype=None):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 1 + step, p.shape), dtype or p.dtype), params)


@functools.cache
def optimizer_and_step(config, seed):
    optimizer = make_optimizer(config, 100, seed)

    @jax.jit
    def step(params, state, gradients, key):
        updates, state = optimizer.update(gradients, state, params)
        return apply_updates(params, updates, key), state

    return optimizer, step


def train(config, params, steps=STEPS, seed=0, state=None, start=0):
    """(params, state) after `steps` jitted steps; bfloat16 parameters are rounded with keys that count the steps."""
    optimizer, step = optimizer_and_step(config, seed)
    state = optimizer.init(params) if state is None else state
    for i in range(start, start + steps):
        params, state = step(params, state, gradients_at(i, params), jax.random.key(i))
    return params, state


def numpy_adamw(config, params, steps=STEPS):
    """AdamW as its paper writes it, float64: the list of leaves after `steps`."""
    leaves, treedef = jax.tree.flatten(params)
    decayed = [is_decayed(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    w = [np.asarray(x, np.float64) for x in leaves]
    m, v = [np.zeros_like(x) for x in w], [np.zeros_like(x) for x in w]
    for t in range(1, steps + 1):
        g = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradients_at(t - 1, params))]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        g = [x * min(1.0, config.max_grad_norm / norm) for x in g]
        for i in range(len(w)):
            m[i] = config.b1 * m[i] + (1 - config.b1) * g[i]
            v[i] = config.b2 * v[i] + (1 - config.b2) * g[i] ** 2
            w[i] = w[i] * (1 - config.learning_rate * config.weight_decay * decayed[i])
            m_hat, v_hat = m[i] / (1 - config.b1**t), v[i] / (1 - config.b2**t)
            w[i] = w[i] - config.learning_rate * m_hat / (np.sqrt(v_hat) + config.eps)
    return treedef.unflatten(w)


def distance(a, b):
    """Largest absolute difference between two trees."""
    return max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max() for x, y in zip(
        jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # fmt: skip


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_float64_adamw(max_grad_norm, weight_decay):
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    params = make_params()
    trained, state = train(config, params)
    assert distance(trained, numpy_adamw(config, params)) < 2e-6
    assert distance(trained, params) > 1e-2
    assert int(state.count) == STEPS


def test_equals_torch_adamw(torch):
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, b1=0.8, b2=0.95, eps=1e-6, max_grad_norm=3.0)
    params = make_params()
    ours = [torch.nn.Parameter(torch.tensor(np.asarray(p))) for p in jax.tree.leaves(params)]
    decayed = [is_decayed(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    groups = [
        {"params": [p for p, d in zip(ours, decayed, strict=True) if d == wanted], "weight_decay": 0.1 * wanted}
        for wanted in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    for step in range(STEPS):
        for p, g in zip(ours, jax.tree.leaves(gradients_at(step, params)), strict=True):
            p.grad = torch.tensor(np.asarray(g))
        torch.nn.utils.clip_grad_norm_(ours, 3.0)
        adamw.step()
    trained, _ = train(config, params)
    # torch divides by norm + 1e-6 when it clips.
    assert distance(jax.tree.leaves(trained), [p.detach().numpy() for p in ours]) < 5e-6


def test_weight_decay_leaves_biases_and_norms_alone():
    params = make_params()
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["embed"], -0.005 * params["embed"], rtol=1e-6)
    np.testing.assert_allclose(updates["layers"]["q"]["kernel"], -0.005 * params["layers"]["q"]["kernel"], rtol=1e-6)
    for still in (updates["norm"], updates["layers"]["attn_norm"], updates["layers"]["q"]["bias"]):
        assert not np.asarray(still).any()
    with pytest.raises(ValueError, match="parameters"):
        optimizer.update(zeros, optimizer.init(params))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_the_state_keeps_its_dtypes_and_structure(param_dtype, moments_dtype):
    config = OptimizerConfig(learning_rate=1e-3, moments_dtype=moments_dtype)
    params = make_params(param_dtype)
    promised = jax.eval_shape(make_optimizer(config, 10).init, params)
    trained, state = train(config, params, steps=2)
    assert jax.tree.structure(promised) == jax.tree.structure(state)
    kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert kinds(promised) == kinds(state) and kinds(params) == kinds(trained)
    assert {x.dtype for x in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype(moments_dtype)}
    updates, _ = jax.eval_shape(make_optimizer(config, 10).update, params, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_a_run_that_stops_and_goes_on_is_the_same_run(moments_dtype):
    config = OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=2, moments_dtype=moments_dtype)
    params = make_params(jnp.bfloat16)
    whole = train(config, params, steps=6)
    half = train(config, params, steps=3)
    saved = jax.tree.map(np.asarray, half)
    loaded_params, loaded_state = jax.tree.map(jnp.asarray, saved)
    resumed = train(config, loaded_params, steps=3, state=loaded_state, start=3)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_sharded_parameters_give_sharded_moments_and_the_same_numbers(moments_dtype):
    devices = jax.devices()
    if len(devices) < 4:
        pytest.skip(f"{len(devices)} device: sharding needs four")
    mesh = jax.sharding.Mesh(np.array(devices[:4]), ("fsdp",))
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, moments_dtype=moments_dtype)
    params = make_params(jnp.bfloat16)
    placed = jax.device_put(
        params, jax.tree.map(lambda p: NamedSharding(mesh, PartitionSpec(*(None,) * (p.ndim - 1), "fsdp")), params)
    )
    trained, state = train(config, placed, steps=3)
    for p, m, v in zip(*(jax.tree.leaves(t) for t in (placed, state.mu, state.nu)), strict=True):
        assert m.sharding.is_equivalent_to(p.sharding, p.ndim) and v.sharding.is_equivalent_to(p.sharding, p.ndim)
    alone, alone_state = train(config, params, steps=3)
    # The norm is summed in another order, which may turn a rounding here and there: a bfloat16 step at most.
    assert distance(trained, alone) <= 2**-6 and distance(state.nu, alone_state.nu) <= 1e-4
    same = np.concatenate([(np.asarray(a) == np.asarray(b)).ravel() for a, b in zip(
        jax.tree.leaves(trained), jax.tree.leaves(alone), strict=True)])  # fmt: skip
    assert same.mean() > 0.99


def test_the_noise_of_steps_leaves_and_neighbours_is_independent():
    """Counts of steps up out of 300 with probability 0.3 each: mean and variance of a binomial, no correlation."""
    n, steps, chance = 4000, 300, 0.3
    start = {"a": jnp.ones(n, jnp.bfloat16), "b": jnp.ones((40, n // 40), jnp.bfloat16)}
    update = jax.tree.map(lambda p: jnp.full(p.shape, chance * 2.0**-7), start)

    def one(i, counts):
        moved = apply_updates(start, update, jax.random.fold_in(jax.random.key(0), i))
        return jax.tree.map(lambda c, p: c + (p > 1), counts, moved)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), start)
    counts = jax.jit(lambda: jax.lax.fori_loop(0, steps, one, zeros))()
    a, b = (np.asarray(counts[name], np.float64).ravel() for name in ("a", "b"))
    for c in (a, b):
        assert c.mean() == pytest.approx(steps * chance, abs=4 * np.sqrt(steps * chance * (1 - chance) / n))
        assert c.var() == pytest.approx(steps * chance * (1 - chance), rel=4 * np.sqrt(2 / n))
    for x, y in ((a, b), (a[1:], a[:-1]), (b[40:], b[:-40])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(n)


def test_small_updates_reach_bfloat16_weights_on_average():
    """Each update is 1/50 of the distance between two bfloat16 numbers: a plain cast would lose all of them."""
    ones = {"w": jnp.ones(20_000, jnp.bfloat16)}
    update = {"w": jnp.full(20_000, 2.0**-7 / 50)}
    assert (ones["w"] + update["w"].astype(jnp.bfloat16) == 1).all()

    @jax.jit
    def walk(params):
        return jax.lax.fori_loop(0, 25, lambda i, p: apply_updates(p, update, jax.random.key(i)), params)

    w = np.asarray(walk(ones)["w"], np.float64)
    assert w.mean() == pytest.approx(1 + 25 * 2.0**-7 / 50, abs=4 * w.std() / np.sqrt(w.size))
    assert w.std() < 2.0**-7


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, -123.456])
def test_rounding_is_unbiased_and_goes_to_a_neighbour(value):
    n = 40_000
    x = np.float32(value)
    rounded = apply_updates(jnp.zeros(n, jnp.bfloat16), jnp.full(n, x), jax.random.key(7))
    bits = np.asarray(x).view(np.uint32)
    below, above = (np.array([bits >> 16, (bits >> 16) + 1], np.uint32) << 16).view(np.float32).astype(np.float64)
    got = np.asarray(rounded, np.float64)
    assert set(got) == {below, above}
    share = (float(x) - below) / (above - below)
    assert (got == above).mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / n))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.5, 0.0078125, 3.3895314e38, np.inf, -np.inf])
def test_what_bfloat16_can_hold_stays(value):
    params = {"w": jnp.full(5000, value, jnp.bfloat16)}
    kept = apply_updates(params, {"w": jnp.zeros(5000)}, jax.random.key(1))
    np.testing.assert_array_equal(np.asarray(kept["w"], np.float32), np.asarray(params["w"], np.float32))


def test_nan_stays_nan():
    payloads = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    kept = apply_updates(jnp.zeros(5, jnp.bfloat16), jnp.asarray(payloads), jax.random.key(1))
    assert np.isnan(np.asarray(kept, np.float32)).all()


def test_the_second_moment_decays_in_bfloat16():
    """b2 = 0.999 changes it by 1/1000 a step, less than bfloat16 resolves: a plain cast would leave it where it is."""
    config = OptimizerConfig(moments_dtype="bfloat16", max_grad_norm=1e9)
    params = {"w": jnp.zeros(4000)}
    optimizer = make_optimizer(config, 1000)
    state = optimizer.init(params)._replace(nu={"w": jnp.ones(4000, jnp.bfloat16)})
    zeros = {"w": jnp.zeros(4000)}
    state = jax.jit(lambda s: jax.lax.fori_loop(0, 200, lambda _, s: optimizer.update(zeros, s, params)[1], s))(state)
    nu = np.asarray(state.nu["w"], np.float64)
    assert nu.mean() == pytest.approx(0.999**200, abs=4 * nu.std() / np.sqrt(nu.size))
    assert nu.std() < 0.04


def test_bfloat16_training_follows_float32_training():
    config = OptimizerConfig(learning_rate=1e-2, moments_dtype="bfloat16")
    params = make_params(jnp.bfloat16)
    wanted, _ = train(OptimizerConfig(learning_rate=1e-2), jax.tree.map(lambda p: p.astype(jnp.float32), params))
    trained, _ = train(config, params)
    assert distance(trained, wanted) < 0.08
    offset = np.concatenate([(np.asarray(a, np.float64) - np.asarray(b, np.float64)).ravel() for a, b in zip(
        jax.tree.leaves(trained), jax.tree.leaves(wanted), strict=True)])  # fmt: skip
    assert abs(offset.mean()) < 4 * offset.std() / np.sqrt(offset.size)


def test_the_seed_moves_the_rounding_of_moments_alone():
    config = OptimizerConfig(learning_rate=1e-2, moments_dtype="bfloat16")
    a, b = (train(config, {"w": jnp.ones(100)}, steps=1, seed=s) for s in (0, 1 << 63))
    np.testing.assert_array_equal(a[0]["w"], b[0]["w"])  # the first update is computed before its moments are stored
    assert distance(a[1].mu, b[1].mu) > 0 and distance(a[1].nu, b[1].nu) > 0


def test_apply_updates_refuses_what_it_cannot_do_well():
    with pytest.raises(ValueError, match="key"):
        apply_updates({"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.ones(2)}, None)
    with pytest.raises(TypeError, match="float16"):
        apply_updates({"w": jnp.ones(2, jnp.float16)}, {"w": jnp.ones(2)}, None)
    new = apply_updates({"w": jnp.ones(2)}, {"w": jnp.full(2, 0.5)}, None)
    assert new["w"].tolist() == [1.5, 1.5]


def rates(total, **settings):
    config = OptimizerConfig(learning_rate=1.0, **settings)
    return [learning_rate_at(config, total, step) for step in range(total)]


def test_schedules():
    assert rates(4) == [1.0] * 4
    assert rates(6, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert rates(6, warmup_steps=2, schedule="linear") == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    cosine = [0.5 * (1 + np.cos(np.pi * k / 4)) for k in range(4)]
    assert rates(6, warmup_steps=2, schedule="cosine") == pytest.approx([0.5, 1.0, *cosine])
    assert rates(2, warmup_steps=4, schedule="linear") == pytest.approx([0.25, 0.5])
    for schedule in ("linear", "cosine"):
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule)
        assert [learning_rate_at(config, 5, step) for step in (5, 50)] == [0.0, 0.0]
    with pytest.raises(ValueError, match="total_steps"):
        make_optimizer(OptimizerConfig(), 0)


def test_the_reported_learning_rate_is_the_one_used():
    config = OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=3)
    params = {"w": jnp.zeros(1)}
    optimizer = make_optimizer(config, 8)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(8):
        updates, state = update({"w": jnp.ones(1)}, state, params)
        # Adam's direction for a gradient that never changes is 1.
        assert -float(updates["w"][0]) == pytest.approx(learning_rate_at(config, 8, step), rel=1e-4)
