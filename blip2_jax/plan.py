"""What a training step needs and how long it takes on a TPU pod, from a machine that has none.

python -m blip2_jax.plan --config=configs/stage1.py:eva_g --topology=v5e:16x16
python -m blip2_jax.plan --config=configs/stage2.py:flan_t5_xxl --topology=v4:4x4x4 --mesh=data=4,fsdp=16 --json=FILE
python -m blip2_jax.plan --config=configs/stage1.py --devices=cpu:8        # a dry run on fake devices

The real training step is compiled ahead of time by libtpu (pip install 'jax[tpu]'), without weights, data or
tokenizers. Memory and exchanges are the compiled program's; the time is a roofline, below which no step can be.
"""

from __future__ import annotations

import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from blip2_jax import ahead_of_time, configuration, files, flops
from blip2_jax.parallel import chips, collectives, estimate, hlo
from blip2_jax.parallel import mesh as meshes

_SHOWN = 12  # Exchanges in the table; the file has all.


def make_plan(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    topology: chips.Topology | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """The plan of a recipe, as `--json` writes it.

    Bytes and seconds are of one device and one step, `flops` of the whole step. What cannot be known is None: limits
    and times of a dry run, and the exchanges of a program that the compiler refused as too large.

    Args:
      config: the recipe; its mesh is laid over the devices.
      devices: to compile for.
      topology: of these, if they are TPUs.
      steps: length of the run; by default the recipe's.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch not the mesh.
    """
    mesh = meshes.make_mesh(config.mesh, devices)
    task = ahead_of_time.create_task(config, jnp.bfloat16 if topology else None)
    step, arguments = ahead_of_time.abstract_step(task, mesh)
    parts = flops.parts(task)
    with jax.set_mesh(mesh):
        # Never less than the step is worth: a loop whose rounds depend on data counts once there.
        executed = max(flops.executed(step, *arguments), sum(part.total for part in parts))
    start = time.perf_counter()
    compiled = ahead_of_time.compile_step(step, arguments, mesh)
    seconds = time.perf_counter() - start
    limit = topology.chip.hbm_limit_bytes if topology else None
    plan = {
        "topology": str(topology or f"{devices[0].platform}:{len(devices)}"),
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "fits": None if limit is None else compiled.text is not None and compiled.peak_bytes <= limit,
        "hbm_peak_bytes": compiled.peak_bytes,
        "hbm_limit_bytes": limit,
        "argument_bytes": compiled.argument_bytes,
        "temporary_bytes": compiled.temporary_bytes,
        "output_bytes": compiled.output_bytes,
        "program_bytes": compiled.program_bytes,
        "flops": sum(part.total for part in parts),
        "flops_by_part": {part.name: part.total for part in parts},
        "flops_executed": executed,
        "compile_seconds": seconds,
        "steps": config.total_steps if steps is None else steps,
    }
    exchanged = None if compiled.text is None else _exchanges(hlo.parse(compiled.text), len(devices), topology)
    return plan | _described(exchanged) | _times(plan, exchanged, mesh, topology)


def _exchanges(program: hlo.Program, devices: int, topology: chips.Topology | None) -> tuple[hlo.Program, list]:
    return program, collectives.collectives(program, devices, topology.slices if topology else 1)


def _described(exchanged: tuple[hlo.Program, list[collectives.Collective]] | None) -> dict[str, Any]:
    """The keys that the text of the compiled program tells."""
    if exchanged is None:
        return dict.fromkeys(("collectives", "network_bytes", "slices_bytes", "traffic_bytes", "unknown_loops"))
    program, found = exchanged
    sent = lambda between: sum(item.sent * item.count for item in found if item.between_slices == between)
    return {
        "collectives": [
            {
                "kind": item.kind,
                "arrays": [str(array) for array in item.arrays],
                "bytes": item.bytes,
                "bytes_sent": item.sent,
                "count": item.count,
                "devices": len(item.group),
                "between_slices": item.between_slices,
                "origin": item.origin,
            }
            for item in found
        ],
        "network_bytes": sent(False),
        "slices_bytes": sent(True),
        "traffic_bytes": program.traffic(),
        "unknown_loops": program.unknown_loops,
    }


def _times(plan: dict, exchanged: tuple | None, mesh: Mesh, topology: chips.Topology | None) -> dict[str, Any]:
    """The keys that tell how long a step takes."""
    names = ("step_seconds_estimate", "step_seconds_in_turn", "bound", "seconds", "mfu", "images_per_second_per_chip")
    if exchanged is None or topology is None:
        return dict.fromkeys((*names, "chip_hours"))
    program, found = exchanged
    count = plan["chips"]
    times = estimate.estimate(
        plan["flops_executed"] / count, program.traffic(), found, list(mesh.devices.flat), topology
    )
    return {
        "step_seconds_estimate": times.seconds,
        "step_seconds_in_turn": times.seconds_in_turn,
        "bound": times.bound,
        "seconds": times.by_name(),
        "mfu": plan["flops"] / (times.seconds * count * topology.chip.flops),
        "images_per_second_per_chip": plan["batch_size"] / (times.seconds * count),
        "chip_hours": plan["steps"] * times.seconds * count / 3600,
    }


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / chips.GIB:.2f} GiB"


def table(plan: dict[str, Any]) -> str:
    """The plan for people."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    lines = [f"{plan['topology']}, {plan['chips']} devices, mesh {mesh}, batch {plan['batch_size']:,}", ""]
    verdict = {True: "fits", False: "DOES NOT FIT", None: "no limit known"}[plan["fits"]]
    rows = [(name, _gib(plan[f"{name}_bytes"])) for name in ("argument", "temporary", "output", "program")]
    limit = "" if plan["hbm_limit_bytes"] is None else f" of {_gib(plan['hbm_limit_bytes'])}"
    rows += [("peak of a device", f"{_gib(plan['hbm_peak_bytes'])}{limit}: {verdict}"), ("", "")]
    rows += [(name, f"{value / 1e12:,.1f} TFLOP") for name, value in plan["flops_by_part"].items()]
    rows += [("a step", f"{plan['flops'] / 1e12:,.1f} TFLOP, executed {plan['flops_executed'] / 1e12:,.1f}"), ("", "")]
    if plan["seconds"]:
        rows += [(name, f"{1e3 * value:,.1f} ms") for name, value in plan["seconds"].items()]
        rows += [
            ("a step at best", f"{1e3 * plan['step_seconds_estimate']:,.1f} ms, by {plan['bound']}"),
            ("one after another", f"{1e3 * plan['step_seconds_in_turn']:,.1f} ms"),
            ("at best", f"{plan['images_per_second_per_chip']:,.1f} images/s/chip, MFU {plan['mfu']:.0%}"),
            (f"{plan['steps']:,} steps", f"{plan['chip_hours']:,.0f} chip-hours"),
            ("", ""),
        ]
    width = max(len(name) for name, _ in rows)
    lines += [f"{name:{width}}  {value}".rstrip() for name, value in rows]
    return "\n".join(lines + _exchange_lines(plan)) + f"\ncompiled in {plan['compile_seconds']:.0f} s"


def _exchange_lines(plan: dict[str, Any]) -> list[str]:
    if plan["collectives"] is None:
        return ["exchanges: unknown, since the compiler refuses a program that does not fit"]
    lines = [
        f"a device sends {plan['network_bytes'] / 2**20:,.1f} MiB a step within its slice, "
        f"{plan['slices_bytes'] / 2**20:,.1f} MiB to other slices:"
    ]
    for item in plan["collectives"][:_SHOWN]:
        more = f" and {len(item['arrays']) - 1} more" if len(item["arrays"]) > 1 else ""
        where = "slices" if item["between_slices"] else f"{item['devices']} devices"
        lines.append(
            f"  {item['bytes_sent'] * item['count'] / 2**20:10,.2f} MiB  {item['count']:4d} x {item['kind']} "
            f"{item['arrays'][0]}{more} over {where}  {item['origin']}"
        )
    hidden = len(plan["collectives"]) - _SHOWN
    lines += [f"  ... and {hidden} smaller ones"] if hidden > 0 else []
    return lines + [f"counted once, its rounds depend on data: {loop}" for loop in plan["unknown_loops"]]


def _fake_devices(text: str) -> list[jax.Device]:
    match = re.fullmatch(r"cpu:([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"--devices={text}: expected cpu:N, such as cpu:8")
    jax.config.update("jax_num_cpu_devices", int(match[1]))
    return jax.devices("cpu")


def run(
    config: ml_collections.ConfigDict | None,
    topology: str | None = None,
    slices: int = 1,
    devices: str | None = None,
    mesh: str | None = None,
    steps: int | None = None,
    json: str | None = None,
) -> None:
    """Print the plan of a recipe, and write it if `json` names a file; arguments are the flags of the command.

    Raises:
      ValueError, ModuleNotFoundError: they contradict each other, or libtpu is not installed.
    """
    if config is None or (topology is None) == (devices is None):
        raise ValueError("plan needs --config=FILE, and either --topology=CHIP:SIDES or --devices=cpu:N")
    # Nothing runs here, and a TPU that is here stays free for others.
    jax.config.update("jax_platforms", "cpu")
    pod = None
    if topology is not None:
        pod = chips.parse_topology(topology, slices)
    elif slices != 1:
        raise ValueError("--slices goes with --topology: fake devices have one network")
    found = pod.devices() if pod else _fake_devices(devices)
    if mesh is not None:
        config.mesh = mesh
    plan = make_plan(configuration.resolved(config), found, pod, steps)
    print(table(plan))
    if json:
        files.write_json(pathlib.Path(json).expanduser(), plan)


def _define_flags() -> None:
    """Only for the command, since other commands have flags of the same names."""
    config_flags.DEFINE_config_file("config", None, "A recipe: a file of configs/, :VARIANT behind it.")
    flags.DEFINE_string("topology", None, "CHIP:SIDES of a slice, such as v5e:16x16 or v4:4x4x4.")
    flags.DEFINE_integer("slices", 1, "How many such slices, with the data center network between them.")
    flags.DEFINE_string("devices", None, "cpu:N instead of a topology: a dry run on N fake devices.")
    flags.DEFINE_string("mesh", None, "Instead of config.mesh.")
    flags.DEFINE_integer("steps", None, "Length of the run, for its chip-hours; by default config.total_steps.")
    flags.DEFINE_string("json", None, "A file to write the plan to.")


def main(_argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    try:
        run(given.config, given.topology, given.slices, given.devices, given.mesh, given.steps, given.json)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=configuration.parse_flags)
