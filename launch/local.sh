#!/usr/bin/env bash
# One run as several processes on this machine: bash launch/local.sh COUNT [--restarts N] --config=... --workdir=...
#
# What stands behind goes to python -m blip2_jax.main, of the environment that is active. Each line of output begins
# with the number of its process, "[1] ...". GPUs are shared out evenly. When a process dies, the others have a minute
# (GRACE seconds) to end by themselves. SIGTERM and SIGINT go to all of them.
#
#   --restarts N        start all again, up to N times, when the run can go on (see 75 below)
#   --command 'WORDS'   what to start in the place of 'python -m blip2_jax.main'
#
# Exit code: 0 when all processes are done; else that of the first that failed, and 75 where that one was ended by a
# signal: the same command goes on from the last checkpoint.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

is_number() { [[ $1 =~ ^[0-9]+$ ]]; }

parse() {
  if ! is_number "${1:-}" || [ "$1" -eq 0 ]; then
    fail "the number of processes is '${1:-}', expected one above 0: bash launch/local.sh COUNT --config=... --workdir=..."
  fi
  count=$1 restarts=0 command=(python -m blip2_jax.main) arguments=()
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --restarts | --command) [ $# -gt 1 ] || fail "$1 has no value behind it" ;;
    esac
    case $1 in
      --restarts)
        is_number "$2" || fail "--restarts is '$2', expected a number from 0 up"
        restarts=$2
        shift 2
        ;;
      --command)
        read -r -a command <<<"$2"
        shift 2
        ;;
      *)
        arguments+=("$1")
        shift
        ;;
    esac
  done
}

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# The numbers of the GPUs of process INDEX, if there are any and nothing else was said.
own_gpus() {
  local gpus each
  if [ -n "${JAX_LOCAL_DEVICE_IDS:-}" ] || [ "${JAX_PLATFORMS:-}" = cpu ] || ! gpus=$(nvidia-smi -L 2>/dev/null); then
    return
  fi
  gpus=$(grep -c '^GPU' <<<"$gpus") || return 0
  ((gpus % count == 0)) || fail "$count processes cannot share $gpus GPUs evenly"
  each=$((gpus / count))
  seq -s, $(($1 * each)) $(($1 * each + each - 1))
}

start() { # INDEX COORDINATOR
  local environment=() gpus
  if ((count > 1)); then
    gpus=$(own_gpus "$1")
    environment=(JAX_COORDINATOR_ADDRESS="$2" JAX_NUM_PROCESSES="$count" JAX_PROCESS_ID="$1")
    environment+=(${gpus:+"JAX_LOCAL_DEVICE_IDS=$gpus"})
  fi
  set -m # It leads a group of its own: Ctrl-C reaches it once, through this script, and its workers end with it.
  env ${environment[@]+"${environment[@]}"} "${command[@]}" ${arguments[@]+"${arguments[@]}"} </dev/null \
    > >(trap '' INT TERM; prefix "$1") 2>&1 &
  running[$1]=$!
  set +m
}

prefix() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

forward() { # SIGNAL
  local pid
  case $1 in TERM) stopped=75 ;; INT) stopped=130 ;; esac
  for pid in ${running[@]+"${running[@]}"}; do kill -s "$1" "$pid" 2>/dev/null || true; done
}

how() { # CODE
  case $1 in
    75) echo "stopped, and can go on (exit code 75)" ;;
    130) echo "was stopped by Ctrl-C" ;;
    *) if (($1 > 128)); then echo "was killed by SIG$(kill -l "$1")"; else echo "failed with exit code $1"; fi ;;
  esac
}

# Takes note of the processes that have ended since; sets `result` to what the first failure means for the run.
look() {
  local index code
  for index in ${running[@]+"${!running[@]}"}; do
    if kill -0 "${running[index]}" 2>/dev/null; then continue; fi
    code=0
    wait "${running[index]}" 2>/dev/null || code=$?
    unset "running[index]"
    if ((code == 0)); then continue; fi
    echo "process $index $(how "$code")" >&3
    if ((result == 0)); then
      result=$code deadline=$((SECONDS + ${GRACE:-60}))
      if ((code > 128 && code != 130)); then result=75; fi
    fi
  done
}

run() { # Sets `result`.
  local index coordinator deadline=0
  coordinator=127.0.0.1:$(free_port)
  running=() result=$stopped # Not 0 where the signal came before there was a process.
  for ((index = 0; index < count && !stopped; index++)); do start "$index" "$coordinator"; done
  while look; [ ${#running[@]} -gt 0 ]; do
    if ((result != 0 && SECONDS >= deadline)); then
      for index in "${!running[@]}"; do
        echo "process $index has not ended by itself in ${GRACE:-60} s and is killed" >&3
        kill -s KILL -- "-${running[index]}" 2>/dev/null || true
      done
    fi
    sleep 0.2 || true
  done 3>&2 2>/dev/null # Where bash has its own words for how they ended.
}

parse "$@"
stopped=0 running=()
trap 'forward TERM' TERM
trap 'forward INT' INT
command -v python >/dev/null || fail "no python found: activate the environment with the package (source .venv/bin/activate)"
for ((attempt = 0; ; attempt++)); do
  run
  if ((result != 75 || attempt >= restarts || stopped)); then exit "$result"; fi
  echo "starting again ($((attempt + 1)) of $restarts)" >&2
done
