"""Peak memory of reading a large checkpoint: python -m tests.benchmarks.memory [GIGABYTES]

Writes a synthetic OPT in float32 of that size (default 4) into a temporary folder, once as safetensors and, if torch is
there, once as a .bin, reads each into bfloat16 in a process of its own, and prints the peak resident memory beyond what
the process had before and what the result takes.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import save_file

from blip2_jax.checkpoints.huggingface import complete

_READ = """
import json, resource, sys
import jax, jax.numpy as jnp
from blip2_jax import params
from blip2_jax.checkpoints import frozen
part = frozen.find("llm", "hf:" + sys.argv[1])
model = frozen.language_model(part, jnp.bfloat16)
if sys.argv[1].endswith("bin"):
    import torch
jnp.zeros(1).block_until_ready()
status = lambda key: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
before = status("VmRSS")
tree = jax.block_until_ready(frozen.load_language_model(part, model, jnp.bfloat16))
print(json.dumps({"before": before, "peak": status("VmHWM"), "result": params.size(tree)}))
"""


def write(folder: pathlib.Path, gigabytes: float) -> None:
    """An OPT whose tensors are random, one file in safetensors."""
    width, vocabulary = 2048, 50272
    layer = 12 * width**2 * 4
    layers = max(1, round((gigabytes * 1e9 - vocabulary * width * 4) / layer))
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, "num_hidden_layers": layers}
    config = {"model_type": "opt", "num_attention_heads": 32, "vocab_size": vocabulary, **sizes}
    (folder / "config.json").write_text(json.dumps(complete(config)))
    rng = np.random.default_rng(0)
    random = lambda *shape: rng.standard_normal(shape, np.float32)
    root = "model.decoder."
    tensors = {
        f"{root}embed_tokens.weight": random(vocabulary, width),
        f"{root}embed_positions.weight": random(2050, width),
        f"{root}final_layer_norm.weight": random(width),
        f"{root}final_layer_norm.bias": random(width),
    }
    for number in range(layers):
        prefix = f"{root}layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= {f"{prefix}self_attn.{name}.weight": random(width, width)}
            tensors |= {f"{prefix}self_attn.{name}.bias": random(width)}
        for name, shape in {"fc1": (4 * width, width), "fc2": (width, 4 * width)}.items():
            tensors |= {f"{prefix}{name}.weight": random(*shape), f"{prefix}{name}.bias": random(shape[0])}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            tensors |= {f"{prefix}{name}.weight": random(width), f"{prefix}{name}.bias": random(width)}
    save_file(tensors, folder / "model.safetensors")


def measure(folder: pathlib.Path) -> str:
    """A line on what reading a directory takes."""
    command = [sys.executable, "-c", _READ, str(folder)]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    beyond = found["peak"] - found["before"] - found["result"]
    numbers = (size, found["result"], found["peak"], beyond, found["before"])
    size, result, peak, beyond, before = (value / 1e9 for value in numbers)
    return (
        f"{size:.2f} GB in float32 -> {result:.2f} GB in bfloat16: peak {peak:.2f} GB, {beyond:.2f} GB beyond the "
        f"result and the {before:.2f} GB before"
    )


def main(gigabytes: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        safe = pathlib.Path(folder) / "safetensors"
        safe.mkdir()
        write(safe, gigabytes)
        print("safetensors:", measure(safe), flush=True)
        try:
            import torch
        except ImportError:
            return
        from safetensors.torch import load_file

        pickled = pathlib.Path(folder) / "bin"
        pickled.mkdir()
        torch.save(load_file(safe / "model.safetensors"), pickled / "pytorch_model.bin")
        (pickled / "config.json").write_text((safe / "config.json").read_text())
        (safe / "model.safetensors").unlink()
        print(".bin:", measure(pickled), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0)
