"""The error that a precision costs this very model in PyTorch, which a file of that precision may have, too.

float32's yardstick is the model itself. The others are made here without ONNX, as an independent second opinion.
"""

import copy

import torch
from torch import Tensor, nn

from growkit.ranges import refuse_choice


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """Return a copy of `model` on the CPU, in eval mode, that computes in `precision`: fp32, fp16, bf16 or int8.

    Its answers are float32. int8: every Linear multiplies 8-bit weights, one scale per output channel, by 8-bit
    activations scaled over the whole batch; all else is float32. Where float16 overflows the answers are not finite.

    Raises:
        GrowkitError: no such precision.
    """
    refuse_choice("precision", precision, ("fp32", "fp16", "bf16", "int8"))
    copied = copy.deepcopy(model).cpu().eval()
    copied.register_forward_hook(lambda module, inputs, logits: logits.float())
    if precision in ("fp16", "bf16"):
        return copied.to(torch.float16 if precision == "fp16" else torch.bfloat16)
    if precision == "int8":
        for module in copied.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = _eight_bits(module.weight.data)
                module.register_forward_pre_hook(lambda _, inputs: (_eight_bits_asymmetric(inputs[0]), *inputs[1:]))
    return copied


def _eight_bits(weight: Tensor) -> Tensor:
    step = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / step).round() * step


def _eight_bits_asymmetric(values: Tensor) -> Tensor:
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    step = ((high - low) / 255).clamp(min=torch.finfo(values.dtype).tiny)
    zero = (-low / step).round()
    return ((values / step).round() + zero).clamp(0, 255).sub(zero) * step
