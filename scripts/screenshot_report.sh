#!/usr/bin/env bash
# Pictures of a run's report.html, wide and on a phone, light and dark; fails on anything the browser complains about.
# scripts/screenshot_report.sh RUN OUT    (needs chromium: apt install chromium)
set -euo pipefail
if [ $# -ne 2 ] || [ ! -f "$1/report.html" ]; then
  echo "usage: $0 RUN OUT, where RUN is a run folder that holds report.html" >&2
  exit 2
fi
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [ -z "$browser" ]; then
  echo "no chromium here; on Debian and Ubuntu: apt install chromium" >&2
  exit 2
fi
page=file://$(realpath "$1")/report.html
mkdir -p "$2"
out=$(realpath "$2")
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
complaints=0
for width in 1280 390; do
  for theme in light dark; do
    scheme=$([ "$theme" = dark ] && echo 0 || echo 1)
    log=$profile/$width-$theme.log
    "$browser" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
      --disable-component-update --disable-sync --hide-scrollbars --user-data-dir="$profile/user" \
      --blink-settings=preferredColorScheme="$scheme" --enable-logging=stderr --log-level=0 \
      --window-size="$width,${HEIGHT:-6000}" --screenshot="$out/report-$width-$theme.png" "$page" 2>"$log"
    echo "$out/report-$width-$theme.png"
    if grep CONSOLE "$log" >&2; then complaints=1; fi
  done
done
exit "$complaints"
