"""How far recorded gradients of a transformers T5 case, and ours, are from the same model in float64.

python -m tests.parity.noise DIR/hf/blip2_t5 ...    (needs torch and the transformers that made the recording)

It is why a T5's gradients are compared in float64, and with a wider tolerance: the recording itself, in float32, leaves
the one that other models keep.
"""

from __future__ import annotations

import copy
import pathlib
import sys
from unittest import mock

import numpy as np

from tests.parity import forward_stage2
from tests.parity.golden import Case


def _whole_model(case: Case):
    import transformers

    kind = transformers.InstructBlipConfig if "InstructBlip" in case.meta["class_name"] else transformers.Blip2Config
    config = kind.from_dict(copy.deepcopy(case.config))
    return getattr(transformers, case.meta["class_name"])._from_config(config, attn_implementation="eager")


def float64_gradients(case: Case) -> dict[str, np.ndarray]:
    """Gradients of the case's loss by every parameter, every operation in float64."""
    import torch
    from safetensors.torch import load_file
    from transformers.models.t5 import modeling_t5

    def norm(self, hidden):  # The class computes its variance in float32, whatever it is given.
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def wide(self):  # Attention asks for float32 by .float().
        return self.double()

    model = _whole_model(case)
    head = model.language_model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # The recording has it untied.
    model.load_state_dict(load_file(case.path / "model.safetensors"))
    model.double().eval()
    model.language_model.config.scale_decoder_outputs = False
    batch = {name: torch.from_numpy(array) for name, array in case.inputs.items()}
    batch["pixel_values"] = batch["pixel_values"].double()
    with mock.patch.object(modeling_t5.T5LayerNorm, "forward", norm), mock.patch.object(torch.Tensor, "float", wide):
        loss = model(**batch).loss
        assert loss.dtype == torch.float64
        loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}


def main(folders: list[str]) -> None:
    for folder in folders:
        case = Case(pathlib.Path(folder))
        exact = float64_gradients(case)
        first = lambda pairs: {name: ours for name, (ours, _) in pairs.items()}
        gradients = {
            "recorded": case.gradients,
            "ours in float32": first(forward_stage2.gradients(case, None)),
            "ours in float64": first(forward_stage2.whole_gradients(case, None)),
        }
        for title, found in gradients.items():
            shared = found.keys() & exact.keys()
            errors = {name: np.abs(found[name] - exact[name]) for name in shared}
            beyond = {name: (error - 5e-5 - 1e-4 * np.abs(exact[name])).max() for name, error in errors.items()}
            worst = max(beyond, key=beyond.get)
            print(
                f"{case.name}, {title} against float64: {sum(value > 0 for value in beyond.values())} of {len(shared)} "
                f"tensors beyond 5e-5 + 1e-4 of the value; most {worst}: error {errors[worst].max():.1e}, "
                f"largest value {np.abs(exact[worst]).max():.1f}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
