#!/usr/bin/env bash
# One run on TPU VMs of Google Cloud, a slice or several: bash launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE ...
#
#   create    make the slice        --type=v5e-16 (v4-32, v5p-32, v6e-16, ...) [--spot] [--queued] [--slices=2]
#                                   [--runtime=VERSION]
#   install   copy this repository to all hosts and install it   [--setup='COMMAND', such as one that mounts a disk]
#   start     train on all hosts    --config=FILE --workdir=DIR [ARGUMENTS OF MAIN]
#   follow    the log of a host     [--worker=0]
#   status    of the slice, and of the run on each host
#   stop      the run, which saves its state
#   resume    make a slice that was preempted anew, install, start: with all options of these three
#   delete    the slice
#
# Every command takes --project=PROJECT, --queued or --slices as create did, and --dry-run, which prints what it would
# run and runs nothing. The workdir is a folder that all hosts see. Each host starts its process again when the run can
# go on, up to --restarts=100 times.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}

parse() {
  local word
  command=${1:-} name='' zone='' project='' type='' runtime='' config='' workdir='' setup='' worker=0 restarts=100
  slices=1 spot='' queued='' dry='' arguments=()
  shift || true
  for word in "$@"; do
    case $word in
      --name=* | --zone=* | --project=* | --type=* | --runtime=* | --setup=* | --worker=* | --restarts=* | --slices=* | \
        --config=* | --workdir=*) printf -v "$(expr "$word" : '--\([a-z]*\)=')" %s "${word#*=}" ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --dry-run) dry=1 ;;
      --config.*) arguments+=("$word") ;;
      *) fail "$word is no option of $0, nor a setting of the recipe (--config.NAME=VALUE)" ;;
    esac
  done
  [[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices is '$slices', expected a number above 0"
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts is '$restarts', expected a number from 0 up"
  if ((slices > 1)); then queued=1; fi # They come together or not at all.
}

need() { # OPTION WHAT...
  [ -n "${!1}" ] || fail "$command needs --$1=$2"
}

# What changes something, or would.
call() {
  if [ -n "$dry" ]; then printf '%q ' "$@" | sed 's/ $//'; echo; else "$@"; fi
}

tpus() { # GROUP VERB RESOURCE [OPTIONS]
  call gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"}
}

nodes() {
  local index
  if ((slices == 1)); then echo "$name"; else for ((index = 0; index < slices; index++)); do echo "$name-$index"; done; fi
}

everywhere() { # COMMAND, for the shell of every host.
  local node
  for node in $(nodes); do tpus tpu-vm ssh "$node" --worker=all --command="$1"; done
}

state() {
  if [ -n "$queued" ]; then
    tpus queued-resources describe "$name" --format='value(state.state)'
  else
    tpus tpu-vm describe "$name" --format='value(state)'
  fi
}

create() {
  local accelerator=${type/#v5e-/v5litepod-} options found
  need type 'v5e-16, v4-32, v5p-32 or v6e-16, or another number of chips or cores'
  case ${runtime:-$accelerator} in
    "$runtime") ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "no runtime is known for --type=$type: name one with --runtime=VERSION" ;;
  esac
  options=(--accelerator-type="$accelerator" ${spot:+--spot})
  if [ -z "$queued" ]; then
    tpus tpu-vm create "$name" --version="$runtime" "${options[@]}"
    return
  fi
  if ((slices > 1)); then
    options+=(--node-count="$slices" --node-prefix="$name")
  else
    options+=(--node-id="$name")
  fi
  tpus queued-resources create "$name" --runtime-version="$runtime" "${options[@]}"
  while :; do
    found=$(state)
    case $found in
      ACTIVE) return ;;
      FAILED | SUSPEND*) fail "the request $name is $found: delete it and create it again" ;;
      "gcloud "*) # A dry run.
        echo "$found"
        return
        ;;
    esac
    echo "$name is $found" >&2
    sleep 30
  done
}

install() {
  local archive=blip2_jax.tar.gz node
  call bash -c "git ls-files -z | tar --create --gzip --null --files-from=- --file=$archive"
  for node in $(nodes); do tpus tpu-vm scp "$archive" "$node:" --worker=all; done
  call rm "$archive"
  if [ -n "$setup" ]; then everywhere "$setup"; fi
  # The images' own Python is older than 3.11.
  everywhere "set -e; mkdir -p blip2_jax; tar --extract --gzip --file=$archive --directory=blip2_jax; cd blip2_jax
if [ ! -x .venv/bin/python ]; then python3 -m pip install --quiet --user uv; python3 -m uv venv --quiet --seed --python=3.12 .venv; fi
source launch/environment.sh; prepare_environment tpu"
}

start() {
  local words
  need config 'FILE[:VARIANT], a recipe of configs/'
  need workdir 'DIR, which all hosts see'
  case $workdir in *://*) fail "--workdir=$workdir is an address: mount it on all hosts, and name the folder" ;; esac
  printf -v words ' %q' --config="$config" --workdir="$workdir" ${arguments[@]+"${arguments[@]}"}
  everywhere "cd blip2_jax || exit; if [ -f run.pid ] && kill -0 \$(cat run.pid); then echo 'a run is going on here' >&2; exit 1; fi
PATH=\$PWD/.venv/bin:\$PATH nohup bash launch/local.sh 1 --restarts $restarts --distributed$words >>run.log 2>&1 </dev/null &
echo \$! >run.pid"
}

stop() {
  everywhere "cd blip2_jax && pid=\$(cat run.pid) || exit
kill -TERM \$pid; for second in \$(seq 300); do kill -0 \$pid 2>/dev/null || exit 0; sleep 1; done
echo 'it has not stopped after 300 s' >&2; exit 1"
}

status() {
  state
  everywhere "cd blip2_jax && tail -n 2 run.log; if kill -0 \$(cat run.pid); then echo running; else echo 'not running'; fi"
}

remove() {
  if [ -n "$queued" ]; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

resume() {
  local found
  need config 'FILE[:VARIANT], as start had it'
  need workdir 'DIR, as start had it'
  need type 'TYPE, as create had it'
  if [ -z "$dry" ]; then
    found=$(state) || fail "there is no $name: create it"
    case $found in
      READY | ACTIVE)
        start
        return
        ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPEND* | FAILED) ;;
      *) fail "$name is $found: wait until that has passed" ;;
    esac
  fi
  remove
  create
  install
  start
}

parse "$@"
case $command in
  create | install | start | status | stop | resume | delete | follow) ;;
  *) fail "'$command' is no command: create, install, start, follow, status, stop, resume or delete" ;;
esac
need name 'NAME, of the slice'
need zone 'ZONE, such as us-central2-b'
if [ -z "$dry" ] && ! command -v gcloud >/dev/null; then fail "there is no gcloud here: install the Google Cloud CLI"; fi
case $command in
  delete) remove ;;
  follow) tpus tpu-vm ssh "$(nodes | head -n 1)" --worker="$worker" --command='tail -n 50 -F blip2_jax/run.log' ;;
  *) "$command" ;;
esac
