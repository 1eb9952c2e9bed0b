"""What stages are planned for: GPUs as their vendors describe them."""

import os

from pydantic import BaseModel, ConfigDict, Field

from rlhfscale.runs.paths import GPU_VARIABLE


class Hardware(BaseModel):
    """A kind of GPU and how it is connected.

    Attributes:
        name: as the command line takes it.
        memory_bytes: of one GPU.
        peak_flops: dense products in bfloat16, a second.
        bandwidth: of its memory, bytes a second.
        gpus_per_node: in one machine.
        link_bandwidth: between GPUs of one machine, bytes a second in one direction.
        network_bandwidth: of one GPU's share of a machine's network.
        source: where the numbers are from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_bytes: float = Field(gt=0)
    peak_flops: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    gpus_per_node: int = Field(ge=1)
    link_bandwidth: float = Field(gt=0)
    network_bandwidth: float = Field(gt=0)
    source: str


HARDWARE: dict[str, Hardware] = {
    item.name: item
    for item in (
        Hardware(
            name="h100-80gb",
            memory_bytes=80e9,
            peak_flops=989e12,
            bandwidth=3.35e12,
            gpus_per_node=8,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            source="NVIDIA H100 SXM data sheet: 989 TFLOP/s dense bf16, 3.35 TB/s, NVLink 900 GB/s both ways",
        ),
        Hardware(
            name="a100-80gb",
            memory_bytes=80e9,
            peak_flops=312e12,
            bandwidth=2.039e12,
            gpus_per_node=8,
            link_bandwidth=300e9,
            network_bandwidth=25e9,
            source="NVIDIA A100 SXM data sheet: 312 TFLOP/s dense bf16, 2.039 TB/s, NVLink 600 GB/s both ways",
        ),
        Hardware(
            name="h200-141gb",
            memory_bytes=141e9,
            peak_flops=989e12,
            bandwidth=4.8e12,
            gpus_per_node=8,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            source="NVIDIA H200 SXM data sheet: 989 TFLOP/s dense bf16, 4.8 TB/s, NVLink 900 GB/s both ways",
        ),
        Hardware(
            name="l4-24gb",
            memory_bytes=24e9,
            peak_flops=121e12,
            bandwidth=300e9,
            gpus_per_node=8,
            link_bandwidth=32e9,
            network_bandwidth=12.5e9,
            source="NVIDIA L4 data sheet: 242 TFLOP/s bf16 with sparsity, half of it dense, 300 GB/s, PCIe 4 x16",
        ),
        Hardware(
            name="rtx4090-24gb",
            memory_bytes=24e9,
            peak_flops=165.2e12,
            bandwidth=1.008e12,
            gpus_per_node=4,
            link_bandwidth=32e9,
            network_bandwidth=12.5e9,
            source="NVIDIA Ada architecture paper: 165.2 TFLOP/s dense bf16 with fp32 sums, 1008 GB/s, PCIe 4 x16",
        ),
    )
}

DEFAULT = "h100-80gb"
"""Kind of GPU that stages are placed on where `runs.paths.GPU_VARIABLE` names none."""
OF_TIER = {"gpu": ("h100-80gb", 1), "gpu24": ("rtx4090-24gb", 1), "paper": ("h100-80gb", 64)}
"""Kind and number of GPUs that a tier is planned for unless the caller says; tiers that are not here are for CPUs."""


def kind_for(tier: str | None = None, asked: str | None = None) -> str | None:
    """The kind of GPU that stages are planned for and placed on: what was asked for, else the variable's, else the
    tier's; None for a tier of CPUs. Raises ValueError for one that is not known."""
    kind = asked or os.environ.get(GPU_VARIABLE) or OF_TIER.get(tier, (None, 1))[0]
    return kind and hardware(kind).name


def hardware(name: str) -> Hardware:
    """Hardware by name. Raises ValueError that lists the names."""
    if name not in HARDWARE:
        raise ValueError(f"gpu: unknown GPU {name!r}; allowed: {', '.join(HARDWARE)}")
    return HARDWARE[name]
