"""Sampling: greedy tokens are transformers', draws follow the distribution, and nothing depends on the batch."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FAMILIES, PlainTokenizer, load
from hypothesis import given
from hypothesis import strategies as st

from cz_jax import parallel, rng, shapes
from cz_jax.models import qwen
from cz_jax.ports import SamplingMethod
from cz_jax.sampling.engine import Engine, common_prefix
from cz_jax.sampling.generate import generate
from cz_jax.sampling.methods import draw, invert, nucleus
from cz_jax.sampling.queue import generate_queued

GREEDY = SamplingMethod(temperature=0.0)


def engine(family="qwen2", eos=(2,), mesh=None, **more):
    arch, params, golden = load(family)
    mesh = mesh or parallel.make_mesh(1, 1, 1, jax.devices()[:1])
    return Engine("golden", arch, lambda: params, PlainTokenizer(eos), mesh, **more), golden


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family):
    e, golden = engine(family, eos=(10**6,))
    prompts = [p.tolist() for p in golden["prompts"]]
    got = e.sample(prompts, [[1]] * 3, golden["greedy"].shape[1], GREEDY)
    assert [list(g[0].tokens) for g in got] == golden["greedy"].tolist()


def test_same_request_same_tokens_whatever_else_is_in_the_call():
    e, golden = engine(max_sequences=8)
    prompts = [row[:n].tolist() for row, n in zip(golden["tokens"], (5, 12, 16), strict=True)]
    seeds = [[10, 11], [20, 21], [30, 31]]
    method = SamplingMethod(0.9)
    together = e.sample(prompts, seeds, 24, method)

    def tokens(groups):
        return [[s.tokens for s in group] for group in groups]

    for i in (0, 1, 2):  # alone: another number of rows, so float32 sums may differ in their last bit
        alone = e.sample([prompts[i]], [seeds[i]], 24, method)
        assert tokens(alone) == tokens([together[i]])
        np.testing.assert_allclose(alone[0][0].logprobs, together[i][0].logprobs, atol=1e-5)
    assert e.sample(prompts[::-1], seeds[::-1], 24, method) == together[::-1]
    swapped = e.sample([prompts[0]], [[11, 10]], 24, method)[0]
    assert [s.tokens for s in swapped] == [s.tokens for s in together[0][::-1]]
    assert together[0][0].tokens != together[0][1].tokens


def ragged(golden, count, group):
    """(prompts of different lengths, seeds of their rows)"""
    prompts = [golden["tokens"][i % 3][: 3 + 5 * i % 13].tolist() for i in range(count)]
    return prompts, [[100 * i + g for g in range(group)] for i in range(count)]


def tokens_of(groups):
    return [[(s.tokens, s.ended) for s in group] for group in groups]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots", [1, 4, 7, 16])
def test_queued_rows_sample_what_they_sample_side_by_side(family, slots):
    stops = tuple(range(0, 320, 11))  # answers end after about eleven tokens, or are cut at 24
    side_by_side, golden = engine(family, eos=stops, max_sequences=64)
    queued, _ = engine(family, eos=stops, max_sequences=slots)
    prompts, seeds = ragged(golden, 9, 3)
    wanted = side_by_side.sample(prompts, seeds, 24, SamplingMethod(0.9))
    got = queued.sample(prompts, seeds, 24, SamplingMethod(0.9))
    assert tokens_of(got) == tokens_of(wanted)
    lengths = {len(s.tokens) for group in wanted for s in group}
    assert len(lengths) > 6 and 24 in lengths  # ragged, with some that are cut
    for a, b in zip(sum(got, []), sum(wanted, []), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_queue_decodes_no_more_steps_than_its_rows_need():
    """The loop ends with the last row: 8 slots for 24 rows of which one is long take about as long as that one."""
    free, golden = engine(eos=(10**6,), max_sequences=64)
    prompts, seeds = ragged(golden, 4, 6)
    samples = sum(free.sample(prompts, seeds, 40, SamplingMethod(1.0)), [])
    stop = samples[0].tokens[30]
    ends = [s.tokens.index(stop) + 1 if stop in s.tokens else 40 for s in samples]
    e, _ = engine(eos=(stop,), max_sequences=8)
    with mock.patch.object(qwen, "decode", wraps=counted(qwen.decode, steps := [])):
        jax.clear_caches()
        got = e.sample(prompts, seeds, 40, SamplingMethod(1.0))
    jax.effects_barrier()
    assert [len(s.tokens) for s in sum(got, [])] == ends
    assert max(ends) - 1 <= len(steps) <= list_schedule([n - 1 for n in ends], 8)


@pytest.mark.parametrize("stages", [(7,), (16, 8, 4), (5, 2, 1)], ids=str)
def test_a_queue_that_narrows_samples_the_same(stages):
    e, golden = engine()
    draws = np.random.default_rng(3)
    prompts, lengths = golden["tokens"][np.arange(12) % 3, :9].astype(np.int32), draws.integers(3, 10, 12)
    limits = draws.integers(1, 20, (12, 5)).astype(np.int32)  # some rows end with their first token
    limits[10:] = 0  # and the last prompts have none
    keys = rng.key_data(draws.integers(0, 1 << 63, (12, 5), dtype=np.uint64))
    stops = np.arange(0, 320, 40, dtype=np.int32)
    given = (e.arch, e.params(), prompts, lengths.astype(np.int32), keys, limits, stops)
    options = {"max_new_tokens": 20, "method": SamplingMethod()}
    wanted = generate(*given, **options)
    got = generate_queued(*given, stages=stages, ways=1, **options)
    assert wanted.ended.any() and (wanted.lengths[:10] == 1).any() and (wanted.lengths[:10] < limits[:10]).any()
    for name in ("tokens", "lengths", "ended"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-5)


def counted(function, calls):
    def decode(*args):
        jax.debug.callback(lambda: calls.append(1))
        return function(*args)

    return decode


def list_schedule(lengths, slots):
    """Steps until the last row ends, where each free slot takes the next row at once."""
    free = [0] * slots
    for n in lengths:
        free.sort()
        free[0] += n
    return max(free)


def test_stops_at_any_stop_id_and_counts_it():
    free, golden = engine(eos=(10**6,))
    prompt = golden["tokens"][0][:8].tolist()
    method = SamplingMethod(1.0)
    unstopped = free.sample([prompt], [[5]], 32, method)[0][0]
    assert not unstopped.ended and len(unstopped.tokens) == 32
    stop = unstopped.tokens[9]
    first = unstopped.tokens.index(stop)
    e, _ = engine(eos=(10**6, stop))
    stopped = e.sample([prompt], [[5]], 32, method)[0][0]
    assert stopped.ended and stopped.tokens == unstopped.tokens[: first + 1]
    assert stopped.text == " ".join(map(str, unstopped.tokens[:first]))  # the stop token is no text
    last = unstopped.tokens[31]
    if last not in unstopped.tokens[:31]:
        at_limit = engine(eos=(last,))[0].sample([prompt], [[5]], 32, method)[0][0]
        assert at_limit.ended and len(at_limit.tokens) == 32  # told by its id, never by length


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("temperature", "new_tokens"), [(1.0, 20), (0.6, 20), (1.0, 100)])
def test_reported_logprobs_are_those_of_the_full_forward(family, temperature, new_tokens):
    e, golden = engine(family, eos=(2,) if new_tokens < 64 else (10**6,))
    assert len(shapes.cache_lengths(new_tokens)) == (1 if new_tokens < 64 else 2)
    prompt = golden["tokens"][1][:9]
    for s in e.sample([prompt.tolist()], [[1, 2, 3]], new_tokens, SamplingMethod(temperature, top_p=0.9, top_k=50))[0]:
        assert s.ended or len(s.tokens) == new_tokens
        suffix = np.asarray(s.tokens)[None, None]
        hp, hs = qwen.shared_forward(e.arch, e.params(), prompt[None], np.array([9]), suffix)
        logits = qwen.logits_of(qwen.predicting_hidden(hp, np.array([9]), hs), qwen.head_matrix(e.arch, e.params()))
        full = jax.nn.log_softmax(logits / temperature)[0, 0, np.arange(len(s.tokens)), list(s.tokens)]
        np.testing.assert_allclose(s.logprobs, full, atol=1e-4)


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.0, 0.125]))
    uniform = (jnp.arange(4000) + 0.5) / 4000
    tokens, logprob = draw(jnp.tile(logits[:, None], (1, 4000)), uniform, SamplingMethod())
    np.testing.assert_array_equal(np.bincount(tokens, minlength=5), [2000, 1000, 500, 0, 500])
    np.testing.assert_allclose(np.exp(logprob), np.array([0.5, 0.25, 0.125, 0.0, 0.125])[tokens], rtol=1e-5)


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=70).filter(lambda m: sum(m) > 0.01),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_inversion_equals_a_float64_running_sum(mass, u):
    got = int(invert(jnp.asarray(mass, jnp.float32)[:, None], jnp.asarray([u], jnp.float32))[0])
    assert mass[got] > 0
    exact = np.cumsum(np.asarray(mass, np.float64)) / np.sum(mass, dtype=np.float64)
    low, high = (exact[got - 1] if got else 0.0), exact[got]
    assert low - 1e-5 <= u <= high + 1e-5


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.floats(0.05, 0.99))
def test_nucleus_equals_sorting(mass, top_p):
    mass = np.asarray(mass, np.float32)
    kept = np.asarray(nucleus(jnp.asarray(mass[:, None]), top_p))[:, 0] > 0
    order = np.sort(mass)[::-1]
    threshold = order[np.searchsorted(np.cumsum(order), np.float32(top_p) * mass.sum())]
    np.testing.assert_array_equal(kept, mass >= threshold)


def test_top_k_keeps_the_k_largest():
    logits = jnp.tile(jnp.arange(50.0)[:, None], (1, 200))
    tokens, _ = draw(logits * 0.01, jnp.linspace(0, 0.999, 200), SamplingMethod(top_k=7))
    assert set(np.asarray(tokens).tolist()) == set(range(43, 50))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_the_same_tokens_on_eight_devices(shape):
    e, golden = engine()
    prompts = [row[:7].tolist() for row in golden["tokens"]]
    seeds = [[1, 2]] * 3
    many, _ = engine(mesh=parallel.make_mesh(*shape))
    wanted = e.sample(prompts, seeds, 70, SamplingMethod())  # so many that the caches grow once
    assert tokens_of(many.sample(prompts, seeds, 70, SamplingMethod())) == tokens_of(wanted)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_the_same_tokens_from_a_queue_on_eight_devices(shape):
    stops = tuple(range(0, 320, 11))
    one, golden = engine(eos=stops)
    many, _ = engine(eos=stops, mesh=parallel.make_mesh(*shape), max_sequences=8)
    prompts, seeds = ragged(golden, 13, 3)
    wanted = one.sample(prompts, seeds, 16, SamplingMethod())
    assert tokens_of(many.sample(prompts, seeds, 16, SamplingMethod())) == tokens_of(wanted)


def test_choice_probabilities_equal_the_softmax_of_the_full_forward():
    e, golden = engine("qwen3")
    ids = golden["tokens"]
    prompts = [[ids[0][:30].tolist(), [*ids[0][:20].tolist(), *ids[1][:4].tolist()]], [ids[2][:25].tolist()]]
    got, prefill = e.choice_probabilities(prompts, (7, 9)), jax.jit(partial(qwen.prefill, e.arch))
    for rows, answers in zip(prompts, got, strict=True):
        for row, probabilities in zip(rows, answers, strict=True):
            hidden, _ = prefill(e.params(), np.array([row]), np.array([len(row)]))
            full = jax.nn.softmax(qwen.logits_of(hidden, qwen.head_matrix(e.arch, e.params())))[0]
            np.testing.assert_allclose(probabilities, full[np.array([7, 9])], rtol=1e-4)


def test_common_prefix_leaves_every_row_a_token():
    assert common_prefix([[1, 2, 3]]) == 2
    assert common_prefix([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix([[1, 2], [4, 2]]) == 0


def test_seeds_are_told_apart_by_purpose_and_path():
    seeds = [rng.seed_for(0, "roll out", 3, "t", i) for i in range(4)] + [
        rng.seed_for(0, "propose", 3, "t", 0),
        rng.seed_for(1, "roll out", 3, "t", 0),
    ]
    assert len(set(seeds)) == 6 and all(0 <= s < 1 << 64 for s in seeds)
    assert rng.key_data([1 << 40]).tolist() == [[256, 0]]
