"""The forward passes against transformers' own numbers, and the promises about what a token may see."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FAMILIES, load

from cz_jax import parallel
from cz_jax.errors import ConfigError
from cz_jax.models import attention, cudnn, qwen, splash
from cz_jax.models.spec import RANDOM_SHAPES, arch_from_folder, weights


def all_logits(arch, params, tokens, dtype=jnp.float32):
    hidden, _ = qwen.shared_forward(
        arch, params, tokens, np.full(len(tokens), tokens.shape[1]), np.zeros((len(tokens), 1, 1), np.int32), dtype
    )
    return qwen.logits_of(hidden, qwen.head_matrix(arch, params))


def two_prompts(tokens):
    """(prompts, their lengths, three suffixes of each)"""
    suffixes = np.stack([tokens[:2, 12:20], tokens[:2, 20:28], tokens[:2, 28:36]], axis=1)
    return tokens[:2, :12], np.array([12, 9]), suffixes


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    arch, params, golden = load(family)
    ours = all_logits(arch, params, golden["tokens"])
    assert np.abs(ours - golden["logits"]).max() <= 2e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_the_full_forward(family):
    arch, params, golden = load(family)
    tokens = golden["tokens"]
    full = np.asarray(all_logits(arch, params, tokens))
    lengths = np.array([11, 7, 16])
    prompts = np.where(np.arange(16) < lengths[:, None], tokens[:, :16], 5)
    hidden, cache = qwen.prefill(arch, params, prompts, lengths)
    layered = qwen.for_decoding(arch, params, 24)
    suffix = qwen.empty_suffix(arch, 3, 8, jnp.float32)
    head = qwen.head_matrix(arch, params)
    visible = (np.arange(16) < lengths[:, None])[:, None]
    rows, decode = np.arange(3), jax.jit(partial(qwen.decode, arch))
    np.testing.assert_allclose(qwen.logits_of(hidden, head), full[rows, lengths - 1], atol=1e-4)
    for at in range(8):
        token, positions = tokens[rows, lengths + at][:, None], (lengths + at)[:, None]
        step, suffix = decode(layered, token, positions, at, np.arange(8) <= at, cache, visible, suffix)
        np.testing.assert_allclose(qwen.logits_of(step[:, 0], head), full[rows, lengths + at], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_the_prompt_equals_repeating_it(family):
    arch, params, golden = load(family)
    prompts, lengths, suffixes = two_prompts(golden["tokens"])
    _, shared = qwen.shared_forward(arch, params, prompts, lengths, suffixes)
    for p in range(2):
        for g in range(3):
            row = np.concatenate([prompts[p, : lengths[p]], suffixes[p, g]])[None]
            alone, _ = qwen.shared_forward(arch, params, row, np.array([row.shape[1]]), np.zeros((1, 1, 1), np.int32))
            np.testing.assert_allclose(shared[p, g], alone[0, lengths[p] :], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_last_tokens_alone_equals_reading_all(family):
    arch, params, golden = load(family)
    prompts, lengths, suffixes = two_prompts(golden["tokens"])
    suffix_lengths = np.array([[8, 1, 5], [3, 8, 2]])
    _, hidden = qwen.shared_forward(arch, params, prompts, lengths, suffixes)
    last = qwen.last_hidden(arch, params, prompts, lengths, suffixes, suffix_lengths)
    wanted = np.take_along_axis(np.asarray(hidden), (suffix_lengths - 1)[..., None, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(last, wanted, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_never_moves_an_earlier_one_and_rows_do_not_leak(family):
    arch, params, golden = load(family)
    tokens = golden["tokens"]
    prompts, lengths = tokens[:2, :12], np.array([12, 9])
    suffixes = np.stack([tokens[:2, 12:20], tokens[:2, 20:28]], axis=1)
    run = jax.jit(lambda p, s: qwen.shared_forward(arch, params, p, lengths, s))
    prompt_before, before = map(np.asarray, run(prompts, suffixes))
    changed = suffixes.copy()
    changed[0, 1, 5] = (changed[0, 1, 5] + 7) % arch.vocab_size
    prompt_after, after = map(np.asarray, run(prompts, changed))
    moved = (before != after).any(-1)
    assert moved[0, 1, 5:].all()
    assert moved.sum() == moved[0, 1, 5:].sum()
    assert (prompt_before == prompt_after).all()
    padded = prompts.copy()
    padded[1, 9:] = 3  # behind the prompt's real end
    _, after = map(np.asarray, run(padded, suffixes))
    assert (before == after).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_remat_and_unrolled_layers_change_nothing(family):
    arch, params, golden = load(family)
    prompts, lengths = golden["tokens"][:, :10], np.array([10, 10, 6])
    suffixes = golden["tokens"][:, None, 10:20]

    def loss(params, remat):
        return (qwen.shared_forward(arch, params, prompts, lengths, suffixes, remat=remat)[1] ** 2).sum()

    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    plain, *others = (gradients(params, r) for r in (None, "products", "layer"))
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), plain, other)
    unrolled = loss(qwen.for_decoding(arch, params, 24), None)
    np.testing.assert_allclose(loss(params, None), unrolled, rtol=1e-6)


# As they run without their hardware: Splash Attention interpreted, and what is asked of cuDNN worked out by XLA.
KERNELS = {
    "splash": (splash, partial(splash.attend_packed, interpret=True)),
    "cudnn": (cudnn, partial(cudnn.attend_packed, implementation="xla")),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_gives_what_plain_attention_gives(name):
    """Alone and over a mesh, against the same in float64: values and derivatives."""
    draws = np.random.default_rng(0)
    p, tp, g, ts, heads, kv_heads, size = 4, 40, 3, 24, 4, 2, 64
    t, lengths = tp + g * ts, np.array([40, 17, 1, 33])
    q, k, v = (draws.normal(size=(p, t, n, size)) for n in (heads, kv_heads, kv_heads))
    real = (np.arange(t) < lengths[:, None]) | (np.arange(t) >= tp)
    weight = draws.normal(size=q.shape) * real[..., None, None]

    def pulled(attend, q, k, v):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, lengths, g, ts), q, k, v)
        return out * real[..., None, None], *pull(jnp.asarray(weight, out.dtype))

    kernel = jax.jit(partial(pulled, KERNELS[name][1]))
    alone = kernel(*(x.astype(np.float32) for x in (q, k, v)))
    with jax.set_mesh(parallel.make_mesh(1, 4, 2)):
        split = kernel(*(x.astype(np.float32) for x in (q, k, v)))
    with jax.enable_x64(True):
        exact = jax.jit(partial(pulled, attention.attend_packed))(q, k, v)
    for seen in (alone, split):
        for a, b in zip(seen, exact, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_a_model_with_a_kernel_reads_the_same(name, monkeypatch):
    arch, params, golden = load("qwen3")
    prompts, lengths = golden["tokens"][:, :10], np.array([10, 10, 6])
    suffixes = golden["tokens"][:, None, 10:20]
    module, attend_packed = KERNELS[name]
    monkeypatch.setattr(module, "attend_packed", attend_packed)

    def loss(params, arch, remat):
        return (qwen.shared_forward(arch, params, prompts, lengths, suffixes, remat=remat)[1] ** 2).mean()

    both = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    plain = both(params, arch, "products")
    with_kernel = dataclasses.replace(arch, attention=name)
    kernel = both(params, with_kernel, "products")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), plain, kernel)
    last, cache = qwen.prefill(arch, params, prompts, lengths)
    of_kernel, kernel_cache = qwen.prefill(with_kernel, params, prompts, lengths)
    np.testing.assert_allclose(last, of_kernel, atol=1e-5)
    assert [k.shape for k in cache.keys] == [k.shape for k in kernel_cache.keys]


def test_which_kernel_a_platform_has():
    assert [attention.implementation("auto", p) for p in ("cpu", "gpu", "tpu")] == ["plain", "plain", "splash"]
    assert attention.implementation("plain", "tpu") == "plain"
    with pytest.raises(ConfigError, match="a kernel for TPUs, and this is a cpu"):
        attention.implementation("splash", "cpu")
    with pytest.raises(ConfigError, match="a kernel for GPUs, and this is a tpu"):
        attention.implementation("cudnn", "tpu")
    assert attention.implementation("cudnn", "gpu") == "cudnn"


def test_queries_taken_in_pieces_see_what_they_see_at_once(monkeypatch):
    p, tp, g, ts = 2, 21, 3, 17
    draws = np.random.default_rng(3)
    q, k, v = (draws.normal(size=(p, tp + g * ts, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    lengths, weights = np.array([21, 13]), draws.normal(size=q.shape).astype(np.float32)
    weights[1, 13:tp] = 0  # padding

    def pulled(least: int):
        monkeypatch.setattr(attention, "PIECE_TOKENS", least)

        @jax.jit
        def run(*qkv):
            out, pull = jax.vjp(lambda *qkv: attention.attend_packed(*qkv, lengths, g, ts), *qkv)
            return out, *pull(weights)

        return run(q, k, v)

    for pieces, at_once in zip(pulled(4), pulled(1000), strict=True):
        np.testing.assert_allclose(pieces, at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_float32(family):
    arch, params, golden = load(family)
    half = all_logits(arch, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), golden["tokens"], jnp.bfloat16)
    spread = golden["logits"].std()
    assert np.abs(np.asarray(half) - golden["logits"]).mean() < 0.03 * spread


def test_every_published_shape_builds(shared):
    folders = sorted((shared / "model_configs").iterdir())
    assert len(folders) == 6
    for folder in folders:
        arch = arch_from_folder(folder)
        params = jax.eval_shape(lambda arch=arch: qwen.random_params(arch, 0, jnp.bfloat16))
        out = jax.eval_shape(
            lambda p, arch=arch: all_logits(arch, p, np.zeros((1, 16), np.int32), jnp.bfloat16), params
        )
        assert out.shape == (1, 16, arch.vocab_size)
        assert sum(x.size for x in jax.tree.leaves(params)) == arch.parameters


@pytest.mark.parametrize(
    "name, millions", [("qwen2.5-coder-0.5b", 494), ("qwen2.5-coder-1.5b", 1544), ("qwen3-4b", 4022)]
)
def test_random_shapes_have_the_published_sizes(name, millions):
    assert round(RANDOM_SHAPES[name].parameters / 1e6) == millions
    assert len({w.path for w in weights(RANDOM_SHAPES[name])}) == len(weights(RANDOM_SHAPES[name]))
