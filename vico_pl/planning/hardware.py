"""GPUs by name: what they hold and how fast they multiply, from NVIDIA's data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its data sheet has it; operations without sparsity."""

    memory_gib: float
    half_tflops: float  # bfloat16 and float16 on tensor cores
    full_tflops: float  # float32 without TF32

    def tflops(self, precision: str) -> float:
        """Return the peak at a precision of Lightning's."""
        return self.full_tflops if precision.startswith(("32", "64")) else self.half_tflops


# Memory is what the driver reports, a little less than the name says.
GPUS = {
    "L40S": Gpu(memory_gib=44.4, half_tflops=362.0, full_tflops=91.6),
    "A100-80": Gpu(memory_gib=79.2, half_tflops=312.0, full_tflops=19.5),
    "H100-80": Gpu(memory_gib=79.1, half_tflops=989.0, full_tflops=67.0),
    "H200": Gpu(memory_gib=139.8, half_tflops=989.0, full_tflops=67.0),
}
# Share of the memory that a run can count on: the CUDA context, NCCL and gaps between tensors take the rest.
USABLE = 0.92
