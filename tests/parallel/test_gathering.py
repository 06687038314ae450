"""What two processes find apart is known to both; who shares a folder; and if one fails, none goes on."""

import json
import pathlib
import sys

import jax
import pytest

from blip2_jax.parallel import gathering
from blip2_jax.parallel import processes as cluster
from tests import processes


def test_one_process_has_no_one_to_wait_for(tmp_path):
    assert gathering.of_all_processes({"a": [1, None]}) == [{"a": [1, None]}]
    assert gathering.sharers(tmp_path / "never made") == [0]
    with pytest.raises(KeyError), gathering.together("a test"):
        raise KeyError("mine")


def meet(folder: pathlib.Path) -> dict:
    """What one of two processes finds."""
    number = jax.process_index()
    found = {"all": gathering.of_all_processes({"number": number, "text": "long" * number, 3: None})}
    found["shared"] = gathering.sharers(folder / "shared")
    found["own"] = gathering.sharers(folder / f"own_{number}")
    with gathering.together("counting"):
        pass
    try:
        with gathering.together("counting"):
            if number == 1:
                raise ValueError("no more numbers")
    except (OSError, ValueError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def test_two_processes_know_of_each_other(tmp_path):
    ended = processes.run(["tests.parallel.test_gathering", str(tmp_path)], 2, 2)
    assert all(end.code == 0 for end in ended), "\n\n".join(end.output for end in ended)
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first["all"] == second["all"] == [{"number": i, "text": "long" * i, "3": None} for i in range(2)]
    assert first["shared"] == second["shared"] == [0, 1]
    assert (first["own"], second["own"]) == ([0], [1])
    assert first["error"] == "OSError: counting: process 1 of 2 failed: ValueError: no more numbers"
    assert second["error"] == "ValueError: no more numbers"
    assert not list((tmp_path / "shared").iterdir())


if __name__ == "__main__":
    cluster.join(None)
    output = pathlib.Path(sys.argv[1])
    result = meet(output)
    (output / f"{jax.process_index()}.json").write_text(json.dumps(result))
