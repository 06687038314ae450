"""BLIP-2 in JAX/Flax: pre-training, evaluation and generation."""

import os

__version__ = "0.1.0"

# transformers, read here for sizes and tokenizers alone, would say at each start that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
