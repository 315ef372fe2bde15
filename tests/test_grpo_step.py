"""The whole update: exact under padding, bucketing, micro-batches and meshes, and without large buffers."""

import contextlib
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FAMILIES, load

from cz_jax import parallel
from cz_jax.config import OptimizerConfig, from_dict
from cz_jax.grpo import logprobs, loss, step
from cz_jax.grpo.batch import Row, pack
from cz_jax.grpo.loss import LossOptions, denominators
from cz_jax.grpo.optimizer import make_optimizer
from cz_jax.grpo.step import StepOptions, batch_logprobs, init_state, loss_and_gradients, train_step
from cz_jax.models import attention, lora, qwen
from cz_jax.models.spec import tree_of, weights
from cz_jax.nouns import Group, Rollout
from cz_jax.roles.learner import GrpoLearner

# Adam's first step divides each gradient by its own size, rounding included: a large rate would compare the
# rounding of gradients that nearly vanish. Their own comparison is `close`, without a rate.
ADAM = make_optimizer(OptimizerConfig(learning_rate=1e-4), 100)


def some_rows(count, group=3, vocab=320, most=20):
    rows, rng = [], np.random.default_rng(count)
    for _ in range(count):
        prompt = rng.integers(3, vocab, rng.integers(5, 15)).tolist()
        completions = [rng.integers(3, vocab, rng.integers(1, most)).tolist() for _ in range(group)]
        logprobs = [rng.normal(-5, 0.1, len(c)).tolist() for c in completions]
        rows.append(Row(prompt, completions, rng.normal(size=group).tolist(), logprobs))
    return rows


@contextlib.contextmanager
def double_precision():
    """The update's own code with float64 where it says float32."""
    doubled = types.SimpleNamespace(**vars(jnp) | {"float32": jnp.float64})
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        for module in (attention, qwen, logprobs, loss, step):
            stack.enter_context(mock.patch.object(module, "jnp", doubled))
        yield


def over(rows):
    return denominators([[len(c) for c in r.completions] for r in rows], 20)


def options(arch, **more):
    loss = LossOptions(**{k: more.pop(k) for k in list(more) if k in LossOptions.__dataclass_fields__})
    return StepOptions(**{"arch": arch, "loss": loss, "optimizer": ADAM, "chunk": 64} | more)


def close(a, b, relative=1e-5):
    """Every leaf of a equals that of b, its error measured in the leaf's own norm."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= relative * np.linalg.norm(y)


def simple_reference(arch, params, rows, temperature=1.0):
    """Gradients of the token-mean loss, one completion at a time, whole logits, no padding."""

    def loss(params):
        total = 0.0
        for row in rows:
            for completion, advantage, behaviour in zip(row.completions, row.advantages, row.logprobs, strict=True):
                tokens = np.array([*row.prompt, *completion])[None]
                length, no_suffix = np.array([tokens.shape[1]]), np.zeros((1, 1, 1), int)
                hidden, _ = qwen.shared_forward(arch, params, tokens, length, no_suffix, params["norm"].dtype)
                logp = jax.nn.log_softmax(qwen.logits_of(hidden, qwen.head_matrix(arch, params))[0] / temperature)
                at = np.arange(len(row.prompt) - 1, tokens.shape[1] - 1)
                new = logp[at, np.array(completion)]
                weight = jnp.minimum(jnp.exp(jax.lax.stop_gradient(new) - np.array(behaviour)), 2.0)
                total -= (weight * jnp.exp(new - jax.lax.stop_gradient(new)) * advantage).sum()
        return total / sum(len(c) for r in rows for c in r.completions)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_shared_padded_and_chunked_equals_one_row_at_a_time(family):
    arch, params, _ = load(family)
    rows = some_rows(2, group=2, most=8)
    expected = simple_reference(arch, params, rows, temperature=0.8)
    got = loss_and_gradients(options(arch, temperature=0.8), params, {}, pack(rows, 10**6), over(rows))
    close(got[0], expected[0])
    close(got[1], expected[1])


def test_in_double_precision_sharing_padding_and_splitting_are_the_same_function():
    arch, params, _ = load("qwen2")
    rows = []
    for row in some_rows(3, group=2, most=8):  # a batch holds float32: what is beyond it is no difference to find
        kept = [np.float32(p).astype(np.float64) for p in row.logprobs]
        rows.append(Row(row.prompt, row.completions, np.float32(row.advantages).astype(np.float64).tolist(), kept))
    with double_precision():
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        expected = simple_reference(arch, params, rows)
        for chunk, batch in ((64, pack(rows, 10**6)), (7, pack(rows[::-1], 40))):
            got = loss_and_gradients(options(arch, dtype="float64", chunk=chunk), params, {}, batch, over(rows))
            assert {x.dtype for x in jax.tree.leaves(got[:2])} == {np.dtype(np.float64)}
            close(got[:2], expected, 1e-12)


def test_padding_buckets_and_micro_batches_change_nothing():
    arch, params, _ = load("qwen2")
    rows = some_rows(5)
    reference = loss_and_gradients(options(arch), params, {}, pack(rows, 10**6), over(rows))
    small = pack(rows, 100)
    assert small.prompts.shape[0] > 1
    for batch in (small, pack(rows[::-1], 10**6), pack(rows, 300, ways=4)):
        got = loss_and_gradients(options(arch, chunk=7), params, {}, batch, over(rows))
        close(got[0], reference[0])
        close(got[1], reference[1])
        for name, value in reference[2].items():
            np.testing.assert_allclose(got[2][name], value, rtol=1e-4, atol=1e-4)
    padded = jax.tree.map(np.asarray, pack(rows, 10**6))
    wide = np.full((*padded.completions.shape[:3], 64), 9, np.int32)  # other padding, other bucket
    wide[..., : padded.completions.shape[3]] = np.where(padded.mask, padded.completions, 11)
    behaviour = np.full(wide.shape, np.nan, np.float32)
    behaviour[..., : padded.behaviour.shape[3]] = np.where(padded.mask, padded.behaviour, np.inf)
    got = loss_and_gradients(
        options(arch), params, {}, padded.replace(completions=wide, behaviour=behaviour), over(rows)
    )
    close(got[1], reference[1])


def test_groups_without_advantage_change_nothing_when_the_denominator_counts_them():
    arch, params, _ = load("qwen2")
    rows = some_rows(3)
    flat = Row(rows[1].prompt, rows[1].completions, [0.0] * 3, rows[1].logprobs)
    everything = [rows[0], flat, rows[2]]
    kept = loss_and_gradients(options(arch), params, {}, pack([rows[0], rows[2]], 10**6), over(everything))
    close(kept[1], loss_and_gradients(options(arch), params, {}, pack(everything, 10**6), over(everything))[1])


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_one_update_on_eight_devices_equals_one_device(shape):
    arch, params, _ = load("qwen2")
    rows = some_rows(6)

    def updated(mesh):
        ways = parallel.batch_devices(mesh)
        place = tree_of(weights(arch), lambda w: parallel.sharding(mesh, w.axes, arch.axis_units))
        state = init_state(jax.device_put(jax.tree.map(jnp.copy, params), place), ADAM, place)
        batch = jax.tree.map(lambda a: parallel.place_batch(mesh, a, 1), pack(rows, 400, ways))
        with jax.set_mesh(mesh):
            gradients = jax.tree.map(
                np.asarray, loss_and_gradients(options(arch), state.params, {}, batch, over(rows))[1]
            )
            state, metrics = train_step(options(arch), state, {}, batch, over(rows))
        for leaf, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(place), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.sharding, wanted)
        return state.params, gradients, metrics

    one, gradients_one, metrics_one = updated(parallel.make_mesh(1, 1, 1, jax.devices()[:1]))
    many, gradients_many, metrics_many = updated(parallel.make_mesh(*shape))
    close(gradients_many, gradients_one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), many, one)
    np.testing.assert_allclose(metrics_many["loss"], metrics_one["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics_many["gradient_norm"], metrics_one["gradient_norm"], rtol=1e-5)


def test_digest_tells_trees_apart_and_not_layouts():
    arch, params, _ = load("qwen2")
    mesh = parallel.make_mesh(2, 2, 2)
    place = tree_of(weights(arch), lambda w: parallel.sharding(mesh, w.axes, arch.axis_units))
    digest = parallel.tree_digest(params)
    assert parallel.tree_digest(jax.device_put(params, place)) == digest
    swapped = params | {"norm": params["norm"][::-1]}
    nudged = params | {"norm": params["norm"].at[3].set(jnp.nextafter(params["norm"][3], 9.0))}
    assert len({digest, parallel.tree_digest(swapped), parallel.tree_digest(nudged)}) == 3


def test_a_batch_that_is_not_finite_leaves_the_state_alone():
    arch, params, _ = load("qwen2")
    rows = some_rows(2)
    before = jax.tree.map(np.asarray, params)
    bad = pack(rows, 10**6)
    bad.advantages[0, 0, 0] = np.nan
    state, metrics = train_step(options(arch), init_state(jax.tree.map(jnp.copy, params), ADAM), {}, bad, over(rows))
    assert metrics["finite"] == 0 and state.step == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_lora_trains_its_pairs_alone_and_merges_into_plain_weights():
    arch, base, _ = load("qwen3")
    pairs = lora.init_lora(arch, 4, 8.0, ("q", "down"), 1, jnp.float32)
    params = lora.join(pairs, base)
    trainable, frozen = lora.split(params)
    assert {k.key for path, _ in jax.tree_util.tree_flatten_with_path(trainable)[0] for k in path[-1:]} == set(
        lora.TRAINED
    )
    rows = some_rows(2)
    state = init_state(jax.tree.map(jnp.copy, trainable), ADAM)
    for _ in range(2):
        state, metrics = train_step(options(arch), state, frozen, pack(rows, 10**6), over(rows))
    assert metrics["gradient_norm"] > 0
    adapted = lora.join(state.params, frozen)
    batch = pack(rows, 10**6)
    with_pairs = batch_logprobs(options(arch), adapted, batch)
    plain = batch_logprobs(options(arch), lora.merged(arch, adapted), batch)
    at_start = batch_logprobs(options(arch), base, batch)
    mask = np.asarray(batch.mask)
    np.testing.assert_allclose(np.asarray(with_pairs)[mask], np.asarray(plain)[mask], atol=1e-5)
    assert np.abs(np.asarray(with_pairs)[mask] - np.asarray(at_start)[mask]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, lora.split(adapted)[1], frozen)


def test_the_compiled_step_holds_no_buffer_of_tokens_by_vocabulary():
    arch, params, _ = load("qwen2")  # vocabulary 320
    rows = some_rows(8, group=4)
    batch = pack(rows, 10**6)
    tokens = int(np.prod(batch.completions.shape[1:]))
    chunk = 32
    for fn, args in ((loss_and_gradients, (params, {}, batch, over(rows))), (batch_logprobs, (params, batch))):
        text = fn.lower(options(arch, chunk=chunk), *args).compile().as_text()
        sizes = [
            np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]*\b320\b[\d,]*)\]", text)
        ]
        largest = max(max(sizes), 320 * arch.hidden_size)
        assert largest < tokens * 320 / 4, f"a buffer of {largest} floats; the chunk has {chunk * 320}"
        assert any(n == chunk * 320 for n in sizes)  # the chunk itself is there, so the search finds what it looks for


def test_nodes_of_other_seeds_share_one_compiled_step():
    """In float32, where nothing is rounded at random: a household of nodes then compiles the update once."""
    arch, params, _ = load("qwen2")
    rollouts = [Rollout("", True, tokens=(4, 5, n), logprobs=(-1.0, -1.0, -1.0)) for n in (6, 7)]
    group = Group(None, "", "", 0, rollouts)
    mesh, before = parallel.make_mesh(1, 1, 1, jax.devices()[:1]), train_step._cache_size()
    for seed in (1, 2):
        config = from_dict({"run": {"seed": seed, "rounds": 3}})
        mine = jax.tree.map(jnp.copy, params)
        learner = GrpoLearner(arch, mine, config, mesh, lambda task: [8, 9, 10], None)
        assert learner.update([group], [[1.0, 0.0]], [True])["gradient_norm"]
    assert train_step._cache_size() == before + 1
