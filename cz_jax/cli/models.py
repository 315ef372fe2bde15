"""Commands about one model: eval, judge, convert, export, bench."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cz_jax.cli import options, show

Model = Annotated[str, typer.Option(help="A Hugging Face folder or hub id, an orbax folder, tiny, or random:SHAPE.")]


def eval_(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="SPEC", help="builtin, mbpp[:PATH][@split], code_contests[:PATH][@split] or file:PATH.jsonl."
        ),
    ],
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="Answers to each task; eval.k, which is 8, otherwise.")
    ] = None,
    evaluator: Annotated[
        str | None, typer.Option(metavar="M", help="The model that judges; evaluator.model otherwise.")
    ] = None,
    sets: options.Sets = (),
    as_json: options.Json = False,
):
    """Measure average@k and pass@k of a model.

    By predicted correctness, per level and source: no answer is executed.

    \b
    Example:
      cz-jax eval --model tiny --tasks builtin@held_out -k 8
    """
    from cz_jax.config import load

    config = load(None, sets)
    k = config.eval.k if k is None else k
    with show.progress() as say:
        say("phase", name="loading JAX", expected=5)
        from cz_jax.build import evaluate_model

        value = evaluate_model(model=model, tasks=tasks, k=k, evaluator=evaluator, config=config, say=say)
    show.result(value, as_json)


def judge(
    model: Model,
    pairs: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="Answers with labels: prompt, test_list, solution, label.")
    ],
    mode: Annotated[
        Literal["direct", "reason", "generate"] | None,
        typer.Option(help="How the verdict is asked for; evaluator.mode, which is direct, otherwise."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Judge the first LIMIT rows only.")] = None,
    sets: options.Sets = (),
    as_json: options.Json = False,
):
    """Measure how good an evaluator is.

    Accuracy, AUROC, calibration error, false-positive rate and abstentions on labelled answers.

    \b
    Example:
      cz-jax judge --model tiny --pairs pairs.jsonl --mode direct --limit 200
    """
    from cz_jax.config import load

    config = load(None, sets)
    mode = config.evaluator.mode if mode is None else mode
    with show.progress() as say:
        say("phase", name="loading JAX", expected=5)
        from cz_jax.build import judge_model

        value = judge_model(model=model, pairs=pairs, mode=mode, config=config, limit=limit, say=say)
    show.result(value, as_json)


def convert(
    hf_dir: Annotated[str, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The orbax folder to write.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="The kept precision; the folder's own otherwise.")
    ] = None,
    as_json: options.Json = False,
):
    """Turn a Hugging Face folder into an orbax folder.

    \b
    Example:
      cz-jax convert Qwen/Qwen2.5-Coder-0.5B-Instruct models/coder-0.5b --dtype bfloat16
    """
    with show.progress() as say:
        say("phase", name=f"converting {hf_dir}")
        from cz_jax.build import convert_model

        value = convert_model(hf_dir=hf_dir, out=out, dtype=dtype)
    show.result(value, as_json)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or an orbax folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The Hugging Face folder to write.")],
    as_json: options.Json = False,
):
    """Turn a run into a Hugging Face folder.

    The transformers library loads it as it is.

    \b
    Example:
      cz-jax export runs/first models/first
    """
    with show.progress() as say:
        say("phase", name=f"exporting {run}")
        from cz_jax.build import export_run

        value = export_run(run=run, out=out)
    show.result(value, as_json)


def bench(
    what: Annotated[
        Literal["rollout", "train", "judge"], typer.Argument(metavar="WHAT", help="rollout, train or judge.")
    ],
    model: Model = "random:qwen2-50m",
    prompts: Annotated[int, typer.Option(metavar="B", min=1, help="Prompts.")] = 4,
    group: Annotated[int, typer.Option(metavar="G", min=1, help="Answers to each prompt.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(metavar="P", min=1, help="Tokens of each prompt.")] = 192,
    new_tokens: Annotated[int, typer.Option(metavar="C", min=1, help="Tokens of each answer, made exactly.")] = 64,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="The precision of weights and arithmetic.")
    ] = "float32",
    mode: Annotated[
        Literal["direct", "reason", "generate"], typer.Option(help="For judge: how the verdict is read.")
    ] = "direct",
    as_json: options.Json = False,
):
    """Time sampling, training or judging here.

    Tokens/s, seconds, compile seconds, peak memory and share of the measured matmul peak.

    \b
    Example:
      cz-jax bench rollout --model random:qwen2.5-coder-0.5b --prompts 4 --group 8 --json
    """
    with show.progress() as say:
        say("phase", name="loading JAX", expected=5)
        from cz_jax.bench import bench

        value = bench(
            what, model=model, prompts=prompts, group=group, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
            dtype=dtype, mode=mode, say=say,
        )  # fmt: skip
    show.result(value, as_json)
