"""How the processes of a run find each other, what they say when they do not, and what one does for all."""

import contextlib
import http.server
import json
import os
import sys
import threading
import time

import jax
import pytest

from blip2_jax.parallel import processes
from tests import processes as together

ME = "tests.parallel.test_processes"


@contextlib.contextmanager
def metadata(answer: str):
    """A server in the place of a TPU VM's metadata; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.endswith("/attributes/worker-network-endpoints") and answer
            self.send_response(200 if known and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("answer", "several"), [("w:0:10.0.0.2,w:1:10.0.0.3", True), ("w:0:10.0.0.2", False), ("", False)]
)
def test_a_tpu_vm_is_one_of_several_by_its_metadata(answer, several, monkeypatch):
    monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    with metadata(answer) as address:
        assert processes.expected({"GCE_METADATA_IP": address}) == several
        assert not processes.expected({"GCE_METADATA_IP": address, "TPU_WORKER_HOSTNAMES": "localhost"})


def test_no_metadata_is_asked_for_without_a_tpu(monkeypatch):
    asked = []
    monkeypatch.setattr(processes, "tpu_workers", lambda environment: asked.append(environment) or [])
    assert not processes.expected({})
    assert not asked


def test_a_number_that_is_none_is_named():
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS is 'two'"):
        processes.expected({"SLURM_STEP_NUM_TASKS": "two"})


def test_one_process_does_itself_what_the_first_does():
    done = []
    assert processes.first(lambda: done.append(1)) is None
    assert done == [1]
    with pytest.raises(PermissionError, match="no right"):
        processes.first(raising(PermissionError("no right")))


def test_what_the_first_raises_all_raise():
    ended = together.run([ME, "first"], 2, 2)
    assert [end.code for end in ended] == [0, 0], "\n\n".join(end.output for end in ended)
    found = [json.loads(end.output.splitlines()[-1]) for end in ended]
    for of_one in found:
        assert of_one["errors"] == [
            ["FileNotFoundError", "[Errno 2] not there: 'nö'", 2],
            ["ValueError", "not so", None],
            ["OSError", "[Errno 28] disk full", 28],
        ]
    assert [of_one["done"] for of_one in found] == [[0], []]
    assert found[1]["waited"] >= 2  # For the first, which took so long.


def test_one_that_leaves_waits_for_nobody():
    ended = together.run([ME, "leave"], 2, 2)
    assert ended[1].code == 3, ended[1].output
    assert "an error" in ended[1].output
    assert ended[0].code != 0
    with pytest.raises(SystemExit) as left:
        processes.leave(4)
    assert left.value.code == 4


def test_without_the_others_it_says_so_in_time():
    others = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{together.free_port()}", "JAX_NUM_PROCESSES": "2"}
    (ended,) = together.run([ME, "alone"], 1, 1, **others)
    assert ended.code == 1, ended.output
    for part in ("have not found each other", others["JAX_COORDINATOR_ADDRESS"], "JAX_PROCESS_ID=1", "port"):
        assert part in ended.output


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, "expected all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2: expected below 2"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
    ],
)
def test_who_it_is_has_to_be_said(environment, says, monkeypatch):
    for name in processes._EXPLICIT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Devices were asked for in this process, which jax would complain about first.
    refuse = lambda **_: (_ for _ in ()).throw(ValueError("Number of processes must be defined."))
    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ValueError, match=says):
        processes.join(True)


def raising(problem: Exception):
    def function():
        raise problem

    return function


def of_the_first() -> dict:
    """What `first` gives in this process."""
    done, errors, began = [], [], time.monotonic()
    processes.first(lambda: time.sleep(2))
    waited = time.monotonic() - began
    processes.first(lambda: done.append(jax.process_index()))
    for problem in (FileNotFoundError(2, "not there", "nö"), ValueError("not so"), OSError(28, "disk full")):
        try:
            processes.first(raising(problem))
        except (ValueError, OSError) as error:
            errors.append([type(error).__name__, str(error), getattr(error, "errno", None)])
    return {"done": done, "errors": errors, "waited": waited}


if __name__ == "__main__":
    if sys.argv[1] == "alone":
        os.environ["JAX_PROCESS_ID"] = "1"
        processes._JOIN_SECONDS = 3
        try:
            processes.join(None)
        except ConnectionError as problem:
            sys.exit(f"error: {problem}")
    elif sys.argv[1] == "leave":
        processes.join(None)
        if jax.process_index() == 1:
            print("an error")
            processes.leave(3)
        processes.first(lambda: None)  # Which waits for the other one.
    else:
        processes.join(None)
        print("\n" + json.dumps(of_the_first()))
