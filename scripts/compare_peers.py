"""This package, transformers + torch and google-tunix on the same work, in turn on this machine: a table of ratios.

usage: python scripts/compare_peers.py PEERS_DIR MODEL_DIR [--torch PYTHON] [--tunix PYTHON] [--repeats 3]
                                       [--shapes B,G,P,C ...] [--work rollout train]

PEERS_DIR holds hf_torch.py and tunix_peer.py (each prints one JSON line for `DIR B G P C sample|train`); MODEL_DIR is a
Hugging Face folder that all three load. A peer whose Python is not named is left out. Each repeat runs everybody once,
one after the other, so that a machine that drifts drifts for all; a ratio is the median over repeats of the pairs. A
peer that does not get through is told so in its place, and its last words on standard error.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

SHAPES = ["4,8,192,64"]
WORK = {"rollout": ("sample", "sample_s"), "train": ("train", "train_s")}


def ours(model: str, what: str, shape: list[str], *more: str) -> dict:
    flags = [
        f for pair in zip(("--prompts", "--group", "--prompt-tokens", "--new-tokens"), shape, strict=True) for f in pair
    ]
    program = "import sys; from cz_jax.cli.main import main; sys.exit(main())"
    out = run([sys.executable, "-c", program, "bench", what, "--model", model, *flags, *more, "--json"])
    return {"seconds": out["seconds"], "bytes": out["peak_bytes"], "share": out["matmul_peak_share"]}


def peer(python: str, script: pathlib.Path, model: str, what: str, shape: list[str]) -> dict | None:
    mode, key = WORK[what]
    try:
        out = run([python, str(script), model, *shape, mode])
    except SystemExit as failure:
        print(failure, file=sys.stderr)
        return None
    return {"seconds": out[key], "bytes": out["rss_gb"] * 1e9}


def run(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=pathlib.Path)
    parser.add_argument("model")
    parser.add_argument("--torch")
    parser.add_argument("--tunix")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    a = parser.parse_args()
    scripts = {"transformers": (a.torch, "hf_torch.py"), "tunix": (a.tunix, "tunix_peer.py")}
    others = {name: (python, a.peers / script) for name, (python, script) in scripts.items() if python}
    print(
        "| shape B,G,P,C | work | ours s | peak share | "
        + " | ".join(f"x {n} (min-max) | memory / {n}" for n in others)
        + " |"
    )
    print("|---|---|---|---|" + "---|---|" * len(others))
    for shape in a.shapes:
        for what in a.work:
            turns = []
            for _ in range(a.repeats):
                turn = {"ours": ours(a.model, what, shape.split(","))}
                turn |= {n: peer(*at, a.model, what, shape.split(",")) for n, at in others.items()}
                turns.append(turn)
            cells = [shape, what, f"{statistics.median(t['ours']['seconds'] for t in turns):.2f}"]
            cells.append(f"{statistics.median(t['ours']['share'] for t in turns):.0%}")
            for name in others:
                if any(t[name] is None for t in turns):
                    cells += ["does not get through", "-"]
                    continue
                ratios = sorted(t[name]["seconds"] / t["ours"]["seconds"] for t in turns)
                memory = statistics.median(t["ours"]["bytes"] / t[name]["bytes"] for t in turns)
                cells += [f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})", f"{memory:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
