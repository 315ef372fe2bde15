#!/usr/bin/env bash
# cz-jax plan for every configuration on the machine that it is for: one line each, with what the compiler says where
# libtpu is installed (pip install 'cz-jax[plan]'; a slice takes about three minutes and 3.5 GB on two busy cores).
# --count counts from shapes alone.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python

while read -r config topology; do
  "$python" -c 'import sys; from cz_jax.cli.main import main; sys.exit(main())' \
    plan "configs/$config.toml" --topology "$topology" "$@" --json |
    "$python" -c '
import json, sys
v = json.load(sys.stdin)
sizes = " ".join("%s %.1f" % (kind, size / 1e9) for kind, size in v["bytes_per_device"].items())
fits = "fits" if v["fits"] else "DOES NOT FIT"
print(sys.argv[1], v["topology"], fits, "in %.1f GB:" % (v["hbm_bytes"] / 1e9), sizes, "| %.0f s a round" % v["seconds_estimate"],
      "|", v["counted_by"], "|", "compiled in %.0f s" % sum(v["compile_seconds"].values()))
' "$config"
done <<'LIST'
cpu cpu-16gb
gpu-24gb-0.5b gpu-24gb
gpu-24gb-1.5b gpu-24gb
gpu-80gb gpu-80gb
tpu-v5e-8 v5e-8
tpu-multihost v5e-16
LIST
