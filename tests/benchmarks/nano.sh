#!/usr/bin/env bash
# What the README's section "Measured" shows: bash tests/benchmarks/nano.sh DIR seeds|ablations|long
#
# Every run has a folder in DIR with stage1, stage2 and summary.json; python -m tests.benchmarks.tables DIR turns them
# into tables; ablations come after seeds. Interrupted and started again, it goes on where it was.
set -euo pipefail
mkdir -p "$1"
output=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
source launch/environment.sh
prepare_environment

main() { python -m blip2_jax.main "$@"; }
measure() {
  local folder=$1
  shift
  [ -e "$folder/summary.json" ] ||
    python -m blip2_jax.evaluate "$@" --data nano:test_drawing --data nano:test_concept --output "$folder"
}

# Both stages in DIR/NAME: run NAME VARIANT "OPTIONS OF BOTH" "OPTIONS OF STAGE 1"
run() {
  local folder=$output/$1 variant=$2
  main --config="configs/stage1.py:$variant" --workdir="$folder/stage1" $3 $4
  main --config="configs/stage2.py:$variant" --workdir="$folder/stage2" --config.init="$folder/stage1" $3
  measure "$folder" --checkpoint "$folder/stage1" --checkpoint "$folder/stage2"
}

case $2 in
  seeds)
    for seed in 0 1 2; do run "seed_$seed" nano "--config.seed=$seed" ""; done
    ;;
  ablations)
    folder=$output/without_stage1
    main --config=configs/stage2.py --workdir="$folder/stage2" --config.init=scratch
    measure "$folder" --checkpoint "$folder/stage2"
    folder=$output/without_begin
    main --config=configs/stage2.py --workdir="$folder/stage2" --config.init="$output/seed_0/stage1" --config.data.begin=
    measure "$folder" --checkpoint "$output/seed_0/stage1" --checkpoint "$folder/stage2"
    run without_itm nano "" "--config.objective.itm=0 --config.evaluation.rerank=0"
    run without_itg nano "" --config.objective.itg=0
    run random_encoder nano --config.vision=random:0 ""
    run without_diversity nano "" --config.objective.diversity=0
    ;;
  long)
    run long nano_long "" ""
    ;;
  *)
    echo "error: expected seeds, ablations or long, found '$2'" >&2
    exit 2
    ;;
esac
