"""The configuration: what careless and hostile input gets, how files and words combine, and the resolved form."""

import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cz_jax.config import MAX_CONFIG_BYTES, Config, changed_keys, from_dict, load, to_toml
from cz_jax.errors import ConfigError
from cz_jax.parallel import prepare_devices


def refused(tmp_path, text, *words) -> str:
    """The one line that refuses a file of this text and these words."""
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(path, words)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


def refused_word(*words) -> str:
    with pytest.raises(ConfigError) as caught:
        load(None, words)
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_empty(tmp_path, text):
    assert "is empty" in refused(tmp_path, text)


@pytest.mark.parametrize("text", [b"\xff\xfe\x00\x01", b"\x7fELF\x02\x01\x01\x80", b"[run]\nseed = \xff"])
def test_binary(tmp_path, text):
    assert "not UTF-8" in refused(tmp_path, text)


def test_nul_bytes_are_no_toml(tmp_path):
    assert "not TOML" in refused(tmp_path, b"[run]\x00")


def test_hundred_megabytes_are_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda self: pytest.fail("a file of this size was read"))
    with pytest.raises(ConfigError, match=f"larger than {MAX_CONFIG_BYTES} bytes"):
        load(path)


def test_the_largest_file_is_read_and_one_byte_more_is_not(tmp_path):
    path = tmp_path / "config.toml"
    text = b"[run]\nseed = 3\n#"
    path.write_bytes(text + b"x" * (MAX_CONFIG_BYTES - len(text)))
    assert load(path).run.seed == 3
    path.write_bytes(text + b"x" * (MAX_CONFIG_BYTES - len(text) + 1))
    with pytest.raises(ConfigError, match="larger"):
        load(path)


def test_unknown_key_names_the_nearest_and_its_section(tmp_path):
    said = refused(tmp_path, "[optimizer]\nlearning_rat = 1e-5\n")
    assert "optimizer.learning_rat" in said and "did you mean optimizer.learning_rate?" in said
    assert "did you mean optimizer?" in refused(tmp_path, "[optimiser]\nlearning_rate = 1e-5\n")
    assert "it belongs to optimizer.learning_rate" in refused(tmp_path, "[grpo]\nlearning_rate = 1e-5\n")
    assert "known here" in refused(tmp_path, "[run]\nzzzz = 1\n")
    assert "(and 1 more)" in refused(tmp_path, "[run]\nzzzz = 1\nyyyy = 2\n")


def test_a_key_without_section(tmp_path):
    assert "seed" in refused(tmp_path, "seed = 1\n")


def test_duplicate_key(tmp_path):
    assert "not TOML" in refused(tmp_path, "[run]\nseed = 1\nseed = 2\n")
    assert "not TOML" in refused(tmp_path, "[run]\nseed = 1\n[run]\nrounds = 2\n")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "+nan"])
@pytest.mark.parametrize("key", ["optimizer.learning_rate", "sampling.temperature", "run.rounds", "grpo.kl"])
def test_no_number_that_is_not_finite(tmp_path, number, key):
    section, _, name = key.partition(".")
    refused(tmp_path, f"[{section}]\n{name} = {number}\n")
    refused_word(f"{key}={number}")


@pytest.mark.parametrize(
    "word",
    [
        *("run.seed=-1", "run.rounds=-3", "run.rounds=0", "round.group_size=-8", "optimizer.learning_rate=-1e-6"),
        *("optimizer.learning_rate=0", "grpo.kl=-0.1", "sampling.temperature=-1.0", "sampling.max_new_tokens=0"),
        *("checkpoint.every=0", "round.dataset_tasks=-1", "evaluator.threshold=1.5", "mesh.data=-2", "level.start=6"),
    ],
)
def test_negatives_and_zeros_where_none_may_be(word):
    assert word.partition("=")[0] in refused_word(word)


@pytest.mark.parametrize("size", [0, 1, 1025, 2.5, True, "eight"])
def test_group_size(size):
    with pytest.raises(ConfigError, match="round.group_size"):
        from_dict({"round": {"group_size": size}})


def test_group_of_two_is_the_smallest():
    assert load(None, ["round.group_size=2"]).round.group_size == 2


def test_no_groups_at_all():
    words = ["round.dataset_tasks=0", "round.proposed_tasks=0"]
    assert "nothing to train on" in refused_word(*words)
    assert load(None, [*words, "round.external_groups=1"]).round.external_groups == 1
    assert "nothing to train on" in refused_word("round.dataset_tasks=0", 'proposer.model="none"')


@pytest.mark.parametrize(
    "data, says",
    [
        ({"tasks": {"sources": []}}, "tasks.sources is empty"),
        ({"tasks": {"sources": ["a", "b"], "weights": [1.0]}}, "1 numbers for 2"),
        ({"tasks": {"sources": ["a"], "held_out": ["a"]}}, "both trained on"),
        ({"tasks": {"sources": ["a"]}, "eval": {"tasks": ["a"]}}, "both trained on"),
        ({"level": {"low": 0.8}}, "must be below"),
        ({"level": {"low": 0.1, "hysteresis": 0.2}}, "could never move"),
        ({"level": {"min_count": 49}}, "exceeds level.window"),
        ({"reward": {"structure": 0.0, "format": 0.0, "correctness": 0.0}}, "nothing to learn"),
        ({"mesh": {"data": -1}}, "only one axis"),
        ({"mesh": {"tensor": 0}}, "at least one device"),
        (
            {"run": {"attention": "cudnn"}, "solver": {"compute_dtype": "bfloat16"}},
            "cudnn.*: proposer.dtype=float32, eval",
        ),
    ],
)
def test_relations_between_fields(data, says):
    with pytest.raises(ConfigError, match=says):
        from_dict(data)


def test_missing_file_names_a_call_that_works(tmp_path):
    with pytest.raises(ConfigError, match="does not exist.*Try: cz-jax train"):
        load(tmp_path / "absent.toml")


def test_folder(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)


def test_no_permission(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text("[run]\nseed = 1\n")

    def denied(self):
        raise PermissionError(13, os.strerror(13), str(self))

    monkeypatch.setattr(pathlib.Path, "read_bytes", denied)  # the superuser may read a file of mode 0
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        load(path)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000, "a = " + "{a=" * 3000 + "1" + "}" * 3000, "a" + ".a" * 2000 + " = 1"]
)
def test_deep_nesting(tmp_path, text):
    refused(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    ["run = 1\n", "[[run]]\nseed = 1\n", "[run]\nseed = 1979-05-27\n", '[run]\nseed = "1"\n', "[run]\nseed = 1.0\n",
     "[run]\nseed = true\n", "[run]\nseed = 99999999999999999999999\n", "[solver]\nmodel = 3\n", "[run.seed]\na = 1\n"],
)  # fmt: skip
def test_wrong_types(tmp_path, text):
    refused(tmp_path, text)


@pytest.mark.parametrize("word", ["", "=", "a=1", "run.seed", ".seed=1", "run.=1", "run=1", "run.seed 1"])
def test_words_that_are_no_setting(word):
    assert "section.key=value" in refused_word(word)


def test_words_are_laid_over_the_file_in_order(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[run]\nseed = 1\nrounds = 7\n[solver]\nmodel = "tiny"\n')
    config = load(path, ["run.seed=2", "run.seed=3", "solver.model=random:qwen2-50m", 'tasks.sources=["mbpp@train"]'])
    assert (config.run.seed, config.run.rounds) == (3, 7)
    assert config.solver.model == "random:qwen2-50m" and config.tasks.sources == ("mbpp@train",)


def test_a_bare_word_is_a_string_and_a_wrong_one_is_told():
    assert load(None, ["evaluator.mode=reason"]).evaluator.mode == "reason"
    said = refused_word("evaluator.mode=guess")
    assert "evaluator.mode" in said and "guess" in said


def test_a_word_over_something_that_is_no_section(tmp_path):
    assert "is not a section" in refused(tmp_path, "run = 1\n", "run.seed=1")


def test_values_are_frozen():
    with pytest.raises(ValueError):
        Config().run.seed = 3


def test_changed_between_save_and_resume_lists_the_keys():
    saved = load(None, ["run.rounds=10"])
    now = load(None, ["run.rounds=20", "optimizer.learning_rate=2e-6", "tasks.weights=[1.0]"])
    assert changed_keys(saved, now) == ["run.rounds", "tasks.weights", "optimizer.learning_rate"]
    assert changed_keys(saved, saved) == [] and saved.digest != now.digest
    assert changed_keys(saved, load(None, ["run.rounds=10"])) == []


def test_mesh_that_does_not_divide_the_devices_says_what_was_found():
    from cz_jax.parallel import make_mesh

    class Device:
        platform = "cpu"

    with pytest.raises(ConfigError, match="8 cpu devices"):
        make_mesh(3, -1, 1, [Device()] * 8)
    with pytest.raises(ConfigError, match="8 cpu devices"):
        make_mesh(2, 2, 1, [Device()] * 8)


def test_round_trip_of_the_defaults(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(Config()))
    assert load(path) == Config() and load(path).digest == Config().digest


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(
    peer=text,
    model=st.one_of(st.none(), text),
    sources=st.lists(text, min_size=1, max_size=3),
    rate=st.floats(min_value=0.0, max_value=1.0, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
    before_and_after=st.booleans(),
)
def test_round_trip(tmp_path_factory, peer, model, sources, rate, seed, before_and_after):
    config = from_dict(
        {
            "run": {"seed": seed, "peer": peer},
            "proposer": {"model": model},
            "tasks": {"sources": sources, "held_out": []},
            "optimizer": {"learning_rate": rate},
            "eval": {"before_and_after": before_and_after},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(to_toml(config).encode())
    again = load(path)
    if model is None:
        assert again.proposer.model == "none"
        config, again = (
            from_dict(c.model_dump(mode="json") | {"proposer": {"model": "none"}}) for c in (config, again)
        )
    assert again == config


def test_devices_are_prepared_below_the_environment(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    run = from_dict({"run": {"gpu_memory": 0.5, "xla_flags": ["--xla_a=2", "--xla_b=3"]}}).run
    told = prepare_devices(run.gpu_memory, run.xla_flags)
    assert told == "XLA_PYTHON_CLIENT_MEM_FRACTION=0.5, XLA_FLAGS=--xla_a=1 --xla_b=3"
    assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_b=3"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".7")
    assert prepare_devices(0.5, ()).startswith("XLA_PYTHON_CLIENT_MEM_FRACTION=.7, ")


@pytest.mark.parametrize("run", [{"gpu_memory": 1.5}, {"gpu_memory": 0}, {"xla_flags": ["--fast"]}])
def test_device_settings_that_cannot_be(run):
    with pytest.raises(ConfigError, match=f"run.{next(iter(run))}"):
        from_dict({"run": run})
