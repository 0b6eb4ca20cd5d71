"""The sum of the consistency loss by liger-kernel's fused kernels, on CUDA devices that have the package.

Of its losses only `LigerFusedLinearJSD` makes float32 logits from bfloat16 operands; its chunked one would
round them. At beta 0 the Jensen-Shannon divergence is KL(reference || policy), at beta 1 the reverse.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from jaxtyping import Float
from packaging.version import Version
from torch import Tensor

from vico_pl.losses.consistency import consistency_kl, operands

OLDEST = "0.8.5"  # those before round logits, and hold a loss for each token and word


def check_liger(device: torch.device) -> None:
    """Check that kernel `liger` can run on a device.

    Raises:
        ValueError: it cannot; the message says what to do.
    """
    if device.type != "cuda":
        raise ValueError(
            f"consistency.kernel is 'liger', which runs on CUDA devices, but this run is on {device.type}; "
            "set consistency.kernel=native"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(
            f"consistency.kernel is 'liger', which rounds logits on GPUs of compute capability "
            f"{'.'.join(map(str, capability))}; use one of 8.0 or more, or set consistency.kernel=native"
        )
    try:
        installed = version("liger-kernel")
    except PackageNotFoundError:
        installed = None
    if installed is None or Version(installed) < Version(OLDEST):
        found = "is not installed" if installed is None else f"{installed} is installed"
        raise ValueError(
            f"consistency.kernel is 'liger', but liger-kernel {found}; "
            f"pip install 'liger-kernel>={OLDEST}', or set consistency.kernel=native"
        )


def liger_kl_sum(
    policy_states: Float[Tensor, "R D"],
    policy_head: Float[Tensor, "V D"],
    reference_states: Float[Tensor, "R D2"],
    reference_head: Float[Tensor, "V D2"],
    *,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Float[Tensor, ""]:
    """Return the sum of `consistency_kl` over the response tokens, to float32 rounding.

    How many tokens' logits exist at a time is the kernel's choice. Its gradients are those of one backward
    pass: a graph that is kept and used again gives wrong ones.
    """
    num_tokens = len(policy_states)
    if num_tokens == 0:  # the kernel divides by it
        return consistency_kl(policy_states, policy_head, reference_states, reference_head).sum()
    fused = import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(
        jsd_beta=float(reverse), temperature=temperature, accum_dtype=torch.float32
    )
    policy = operands(policy_states, policy_head, torch.float32)
    reference = operands(reference_states.detach(), reference_head.detach(), torch.float32)
    with torch.autocast(policy_states.device.type, enabled=False):
        mean: Tensor = fused(*policy, *reference, None)
    return mean * num_tokens
