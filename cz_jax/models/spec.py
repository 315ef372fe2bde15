"""What a Qwen model is made of: its architecture read from config.json, and one table that declares each weight once.

Sizes: V vocabulary rows, D hidden, F feed-forward, N query heads, K key/value heads, H head size, L layers. A kernel is
stored [in, out] and the L layers of a weight are stacked on a leading axis; Hugging Face keeps [out, in], a layer a
tensor.
"""

import json
from dataclasses import dataclass

from cz_jax.errors import ModelFolderError

FAMILIES = ("qwen2", "qwen3")


@dataclass(frozen=True)
class Arch:
    """The switches and sizes of one model; hashable, so that it can be a static argument of a jitted function.
    `attention`: what computes it, "plain" jax.numpy or a kernel, "splash" or "cudnn"; no matter of the weights."""

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    max_context: int
    attention: str = "plain"

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def parameters(self) -> int:
        return sum(w.size for w in weights(self))

    @property
    def axis_units(self) -> dict[str, int]:
        """How many indivisible units each logical axis has: heads count, not their flattened columns."""
        return {
            "vocab": self.vocab_size, "embed": self.hidden_size, "ffn": self.ffn_size,
            "heads": self.heads, "kv_heads": self.kv_heads,
        }  # fmt: skip


def arch_from_config(config: dict) -> Arch:
    """The architecture of a Hugging Face config.json. ModelFolderError for another family or a feature not modelled."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelFolderError(f"config.json: model_type {family!r} is not supported", f"known: {', '.join(FAMILIES)}")
    if config.get("auto_map"):
        raise ModelFolderError("config.json: auto_map asks for code from the folder", "remote code is never loaded")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelFolderError(f"config.json: hidden_act {config['hidden_act']!r} is not silu")
    if config.get("use_sliding_window"):
        raise ModelFolderError("config.json: use_sliding_window is not supported")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ModelFolderError(f"config.json: rope type {rope.get('rope_type', rope.get('type'))!r} is not supported")
    if family == "qwen3" and config.get("attention_bias"):
        raise ModelFolderError("config.json: attention_bias is not supported for qwen3")

    def number(name, default=None, kind=int):
        value = config.get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or kind(value) != value
            or not 0 < value < 1 << 40
        ):
            raise ModelFolderError(f"config.json: {name} is {value!r}, not a positive {kind.__name__}")
        return kind(value)

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    arch = Arch(
        family=family,
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        ffn_size=number("intermediate_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads) if config.get("head_dim") else hidden // heads,
        rope_theta=number("rope_theta", rope.get("rope_theta", 10000.0), float),
        norm_eps=number("rms_norm_eps", 1e-6, float),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_context=number("max_position_embeddings", 32768),
    )
    if arch.heads % arch.kv_heads or arch.head_dim % 2:
        raise ModelFolderError(
            f"config.json: {arch.heads} query heads over {arch.kv_heads} key/value heads of {arch.head_dim} do not fit",
            "num_attention_heads must be a multiple of num_key_value_heads, and head_dim even",
        )
    return arch


def arch_from_folder(folder) -> Arch:
    """`arch_from_config` of FOLDER/config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{folder} has no config.json", "not a Hugging Face model folder") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ModelFolderError(f"{path} cannot be read as JSON: {e}", "half a download?") from None
    if not isinstance(config, dict):
        raise ModelFolderError(f"{path} is not a JSON object")
    return arch_from_config(config)


def config_for_export(arch: Arch) -> dict:
    """The config.json of `arch` without token ids, for models that were not read from a folder."""
    known = {
        "hidden_size": arch.hidden_size, "intermediate_size": arch.ffn_size, "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads, "num_key_value_heads": arch.kv_heads, "vocab_size": arch.vocab_size,
        "rms_norm_eps": arch.norm_eps, "rope_theta": arch.rope_theta, "tie_word_embeddings": arch.tied_embeddings,
        "max_position_embeddings": arch.max_context, "hidden_act": "silu", "model_type": arch.family,
        "architectures": [f"Qwen{arch.family[-1]}ForCausalLM"], "attention_dropout": 0.0, "use_cache": True,
        "use_sliding_window": False, "sliding_window": None, "initializer_range": 0.02,
    }  # fmt: skip
    if arch.family == "qwen3":
        known |= {"head_dim": arch.head_dim, "attention_bias": False}
    return known


@dataclass(frozen=True)
class Weight:
    """One weight: where it lives in the parameter tree, its shape, the logical axis of each dimension (None: never
    sharded), its Hugging Face name ("{}" stands for the layer) and whether Hugging Face keeps it transposed."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    hf_name: str
    transposed: bool = False
    init: str = "normal"  # "normal", "zeros" or "ones"

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layer"

    @property
    def size(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def hf_shape(self) -> tuple[int, ...]:
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    def hf_names(self) -> list[str]:
        """The tensor names, in layer order where stacked."""
        return [self.hf_name.format(i) for i in range(self.shape[0])] if self.stacked else [self.hf_name]


def weights(arch: Arch) -> tuple[Weight, ...]:
    """Every weight of `arch`. Logical axes: vocab, embed (D), heads (N*H), kv_heads (K*H), ffn, layer."""
    d, f, n, k = arch.hidden_size, arch.ffn_size, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    table = [Weight(("embed",), (arch.vocab_size, d), ("vocab", "embed"), "model.embed_tokens.weight")]

    def layer(name, shape, axes, hf, **more):
        table.append(
            Weight(("layers", *name), (arch.layers, *shape), ("layer", *axes), f"model.layers.{{}}.{hf}", **more)
        )

    layer(("attn_norm",), (d,), (None,), "input_layernorm.weight", init="ones")
    for name, shape, axes in (("q", (d, n), ("embed", "heads")), ("k", (d, k), ("embed", "kv_heads")),
                              ("v", (d, k), ("embed", "kv_heads")), ("o", (n, d), ("heads", "embed"))):  # fmt: skip
        layer((name, "kernel"), shape, axes, f"self_attn.{name}_proj.weight", transposed=True)
        if arch.qkv_bias and name != "o":
            layer((name, "bias"), shape[1:], axes[1:], f"self_attn.{name}_proj.bias", init="zeros")
    if arch.qk_norm:
        layer(("q_norm",), (arch.head_dim,), (None,), "self_attn.q_norm.weight", init="ones")
        layer(("k_norm",), (arch.head_dim,), (None,), "self_attn.k_norm.weight", init="ones")
    layer(("ffn_norm",), (d,), (None,), "post_attention_layernorm.weight", init="ones")
    for name, shape, axes in (("gate", (d, f), ("embed", "ffn")), ("up", (d, f), ("embed", "ffn")),
                              ("down", (f, d), ("ffn", "embed"))):  # fmt: skip
        layer((name, "kernel"), shape, axes, f"mlp.{name}_proj.weight", transposed=True)
    table.append(Weight(("norm",), (d,), (None,), "model.norm.weight", init="ones"))
    if not arch.tied_embeddings:
        table.append(Weight(("lm_head",), (d, arch.vocab_size), ("embed", "vocab"), "lm_head.weight", transposed=True))
    return tuple(table)


def tree_of(table: tuple[Weight, ...], leaf) -> dict:
    """The parameter tree with `leaf(weight)` at each weight's path."""
    tree: dict = {}
    for w in table:
        node = tree
        for name in w.path[:-1]:
            node = node.setdefault(name, {})
        node[w.path[-1]] = leaf(w)
    return tree


def leaf_of(tree: dict, w: Weight):
    """The leaf of `tree` at the weight's path."""
    for name in w.path:
        tree = tree[name]
    return tree


def _shape(family, d, f, layers, n, k, h, theta=1e6, v=151936, context=32768):
    return Arch(family, v, d, f, layers, n, k, h, theta, 1e-6, True, context)


RANDOM_SHAPES = {
    "qwen2-50m": _shape("qwen2", 512, 2048, 8, 8, 2, 64, v=32768, context=4096),
    "qwen2.5-coder-0.5b": _shape("qwen2", 896, 4864, 24, 14, 2, 64),
    "qwen2.5-coder-1.5b": _shape("qwen2", 1536, 8960, 28, 12, 2, 128),
    "qwen3-0.6b": _shape("qwen3", 1024, 3072, 28, 16, 8, 128, context=40960),
    "qwen3-1.7b": _shape("qwen3", 2048, 6144, 28, 16, 8, 128, context=40960),
    "qwen3-4b": _shape("qwen3", 2560, 9728, 36, 32, 8, 128, context=40960),
    "qwen3-4b-instruct-2507": _shape("qwen3", 2560, 9728, 36, 32, 8, 128, theta=5e6, context=262144),
}
