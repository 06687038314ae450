"""The README's table of plans, from what `plan` has written.

for recipe in stage1.py:eva_g stage2.py:{opt_2_7b,opt_6_7b,flan_t5_xl,flan_t5_xxl}; do
  for topology in v5e:16x16 v4:4x4x4; do
    python -m blip2_jax.plan --config=configs/$recipe --topology=$topology --json=DIR/$topology/${recipe#*:}.json
  done
done
python -m tests.benchmarks.plans DIR
"""

from __future__ import annotations

import json
import pathlib
import sys

_GIB, _MIB = 2**30, 2**20


def row(file: pathlib.Path) -> str:
    plan = json.loads(file.read_text())
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    memory = [plan["argument_bytes"] / _GIB, plan["temporary_bytes"] / _GIB, plan["hbm_peak_bytes"] / _GIB]
    seconds = {name: f"{1000 * plan['seconds'][name]:,.0f}" for name in ("compute", "memory", "network")}
    return (
        f"| {file.stem} | {plan['topology']} | {mesh} | {plan['batch_size']:,} | {memory[0]:.1f} + {memory[1]:.1f} | "
        f"{memory[2]:.1f} of {plan['hbm_limit_bytes'] / _GIB:.1f} | {plan['network_bytes'] / _MIB:,.0f} | "
        f"{seconds['compute']} / {seconds['memory']} / {seconds['network']} | "
        f"{plan['images_per_second_per_chip']:.0f} | {100 * plan['mfu']:.0f} % | {plan['chip_hours']:,.0f} |"
    )


def main(folder: pathlib.Path) -> None:
    print(
        "| recipe | slice | mesh | batch | arguments + temporaries, GiB | peak, GiB | sent a step, MiB | "
        "compute / memory / network, ms | images/s/chip at best | MFU | chip-hours of the run |"
    )
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for file in sorted(folder.glob("*/*.json")):
        print(row(file))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
