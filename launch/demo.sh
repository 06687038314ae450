#!/usr/bin/env bash
# Both stages of BLIP-2 on a laptop, from a fresh clone: bash launch/demo.sh [DIR]
#
# Makes a virtual environment, fetches the frozen parts (about 180 MB, once), trains stage 1 and stage 2 in DIR/stage1
# and DIR/stage2, measures both on pictures they have not seen, and writes DIR/report.html and DIR/summary.json.
# Interrupted and started again, it goes on where it was.
set -euo pipefail
output=${1:-demo}
mkdir -p "$output"
output=$(cd "$output" && pwd)
cd "$(dirname "$0")/.."
source launch/environment.sh

began=$SECONDS
prepare_environment ""
python -c 'from blip2_jax.checkpoints import frozen; [frozen.find(part, "nano:") for part in frozen.PARTS]'
setup=$((SECONDS - began))
echo "[setup done] in $setup s"

started=$(date +%s)
python -m blip2_jax.main --config=configs/stage1.py --workdir="$output/stage1" ${SEED:+--config.seed=$SEED}
python -m blip2_jax.main --config=configs/stage2.py --workdir="$output/stage2" --config.init="$output/stage1" \
  ${SEED:+--config.seed=$SEED}
python -m blip2_jax.evaluate --checkpoint "$output/stage1" --checkpoint "$output/stage2" \
  --data nano:test_drawing --data nano:test_concept --output "$output" --started "$started" --seconds_setup "$setup"
echo "[demo done] open $output/report.html"
