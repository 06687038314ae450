"""gcloud for hosts that are folders on this machine: as much of `compute tpus` as launch/tpu_vm.sh needs.

GCLOUD_HOSTS is a folder of nodes, each with a folder of every host, and a file `state` of the slice.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(os.environ.get("GCLOUD_HOSTS", "."))


def main(group: str, verb: str, *words: str) -> int:
    """Do one command; its exit code."""
    named = [word for word in words if not word.startswith("--")]
    options = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    with (ROOT / "calls").open("a") as calls:
        print(group, verb, file=calls)
    if verb == "create":
        for host in range(2):
            (ROOT / named[0] / str(host)).mkdir(parents=True)
        (ROOT / "state").write_text("READY")
    elif verb == "describe":
        print((ROOT / "state").read_text())
    elif verb == "delete":
        shutil.rmtree(ROOT / named[0])
    elif verb == "scp":
        for host in hosts(named[1].rstrip(":"), options["worker"]):
            shutil.copy(named[0], host)
    elif verb == "ssh":
        started = [
            subprocess.Popen(["bash", "-c", options["command"]], cwd=host)
            for host in hosts(named[0], options["worker"])
        ]
        return max(process.wait() for process in started)
    return 0


def hosts(node: str, worker: str) -> list[pathlib.Path]:
    return [host for host in sorted((ROOT / node).iterdir()) if worker in ("all", host.name)]


if __name__ == "__main__":
    assert sys.argv[1:3] == ["compute", "tpus"]
    sys.exit(main(*sys.argv[3:]))
