"""From losses with and without compression to router targets (InternVL3.5 report, equations 8 and 9)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

COMPRESS, KEEP = 0, 1  # router targets, as in published checkpoints


def loss_ratio(
    compressed: Float[Tensor, "..."], full: Float[Tensor, "..."], *, epsilon: float
) -> Float[Tensor, "..."]:
    """Return the factor of the loss under compression: (compressed + epsilon) / (full + epsilon), in nats.

    >>> loss_ratio(torch.tensor(0.3), torch.tensor(0.1), epsilon=0.1)
    tensor(2.)
    """
    return (compressed + epsilon) / (full + epsilon)


def router_targets(ratios: Float[Tensor, " T"], threshold: float) -> Int64[Tensor, " T"]:
    """Return 0 (compress) where the loss ratio stays under the threshold, else 1 (keep)."""
    return torch.where(ratios < threshold, COMPRESS, KEEP)


class SlidingPercentile(nn.Module):
    """The k-th percentile of the last `window` loss ratios; the window is part of checkpoints."""

    values: Tensor
    seen: Tensor

    def __init__(self, *, percentile: float, window: int, min_history: int) -> None:
        super().__init__()
        self._percentile, self._min_history = percentile, min_history
        self.register_buffer("values", torch.zeros(window))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def update(self, ratios: Float[Tensor, " n"]) -> None:
        """Add loss ratios, the oldest ones fall out."""
        window = len(self.values)
        recent = ratios.detach().to(self.values)[-window:]
        self.values.copy_(torch.cat([self.values, recent])[-window:])
        self.seen += len(ratios)

    def threshold(self) -> float | None:
        """Return the percentile, or None while fewer than `min_history` ratios were seen."""
        count = min(int(self.seen), len(self.values))
        if count < max(self._min_history, 1):
            return None
        return float(torch.quantile(self.values[-count:].float(), self._percentile / 100))
