"""What GPUs and the links between them can do. Every constant has its source beside it; none is fitted to a result.

Peaks and capacities are the vendor's data sheets'. What programs achieve of them was measured by others, mostly in the
published profiles of the simulator Vidur (github.com/microsoft/vidur, data/profiling; the group that wrote
arXiv 2403.02310), called "Vidur" below: CUDA times of a transformer's operators and of NCCL on A100s and A40s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxserve.errors import ConfigError

GIB = 2**30

TILE_ROWS = 128
"""Rows that a matmul computes at once. Vidur, A100, CodeLlama-34B's up projection: 0.51 ms for 128 rows, 0.80 ms for
136; 1.18 ms for 384, 1.63 ms for 392."""
LINK_SHARE = 0.75
"""Of a link's rate that NCCL's all-reduce achieves. Vidur, four A100s in two NVLink pairs, 67 MB in 4.28 ms: 23.5 GB/s
on the ring, whose slowest link is PCIe 4.0 x16, 31.5 GB/s."""


@dataclass(frozen=True)
class Link:
    """A connection between two GPUs."""

    bytes_per_second: float
    """In one direction, on paper."""
    hop_seconds: float
    """Latency of one step of a collective."""

    def send_seconds(self, num_bytes: float) -> float:
        return self.hop_seconds + num_bytes / (self.bytes_per_second * LINK_SHARE)


# Steps of small all-reduces in Vidur's profiles, of 2 (n - 1) each: two GPUs on NVLink, 10 us; four on PCIe, 57 us;
# eight in two nodes, 225 us.
NVLINK_HOP_SECONDS, PCIE_HOP_SECONDS, NETWORK_HOP_SECONDS = 5e-6, 9.5e-6, 16e-6

PCIE_4 = Link(31.5e9, PCIE_HOP_SECONDS)  # x16, PCI-SIG
PCIE_5 = Link(63e9, PCIE_HOP_SECONDS)
ETHERNET_100G = Link(12.5e9, NETWORK_HOP_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU and how it is connected to others of its kind."""

    name: str
    peak_flops_per_second: float
    """Dense, bfloat16 or float16, accumulated in float32."""
    memory_bytes_per_second: float
    memory_bytes: int
    compute_share: float
    """Of the peak that large matmuls achieve."""
    memory_share: float
    """Of the memory's rate that matmuls of few rows achieve, reading weights."""
    attention_share: float
    """Of the peak that attention over a long prompt achieves."""
    kernel_seconds: float = 6e-6
    """The least that any kernel takes. Vidur, A100 and A40: 5 to 7 us for norms and rotary embeddings of a few rows,
    and as much on top of the time that a matmul's weights take to read."""
    nvlink: Link
    nvlink_gpus: int
    """GPUs of a node that reach each other over NVLink; further ones over PCIe."""
    pcie: Link
    node_gpus: int
    """GPUs of a node; further ones are reached over the network."""
    network: Link = ETHERNET_100G

    def link(self, num_gpus: int) -> Link:
        """The slowest link in a ring of that many neighbours."""
        if num_gpus <= self.nvlink_gpus:
            return self.nvlink
        return self.pcie if num_gpus <= self.node_gpus else self.network

    def all_reduce_seconds(self, num_bytes: float, num_gpus: int) -> float:
        """A ring's 2 (n - 1) steps, each of an n-th of the data (Patarasuk and Yuan, 2009)."""
        if num_gpus == 1:
            return 0.0
        return 2 * (num_gpus - 1) * self.link(num_gpus).send_seconds(num_bytes / num_gpus)


# NVIDIA A100 data sheet (SXM, 80 GB): 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s in both directions together.
# Shares: Vidur, CodeLlama-34B: 8192 x 44032 and 4096 rows in 12.1 ms, 244 TFLOP/s; with 32 rows in 0.474 ms, of which
# 6 us are the kernel's least, 1.54 TB/s. Attention: FlashAttention-2 reaches 50 to 73 % (arXiv 2307.08691).
A100_80G = Device(
    name="a100-80g",
    peak_flops_per_second=312e12,
    memory_bytes_per_second=2039e9,
    memory_bytes=80 * GIB,
    compute_share=0.78,
    memory_share=0.755,
    attention_share=0.6,
    nvlink=Link(300e9, NVLINK_HOP_SECONDS),
    nvlink_gpus=8,
    pcie=PCIE_4,
    node_gpus=8,
)

# The machine of arXiv 2403.02310, Azure NC96ads A100 v4 (github.com/microsoft/sarathi-serve, osdi-experiments/
# figure-5-6): four A100 PCIe, 1,935 GB/s by the data sheet, in two NVLink pairs; 100 Gbit/s Ethernet. Vidur doesn't say
# which A100 it measured, so the memory's rate achieved is taken for the same.
A100_80G_PAIRS = replace(
    A100_80G,
    name="a100-80g-pairs",
    memory_bytes_per_second=1935e9,
    memory_share=0.795,
    nvlink_gpus=2,
    node_gpus=4,
)

# NVIDIA A40 data sheet: 149.7 TFLOP/s, 696 GB/s, NVLink between pairs 112.5 GB/s in both directions together.
# Shares: Vidur, Llama-2-70B: 8192 x 28672 and 4096 rows in 17.6 ms, 109 TFLOP/s, and 112 and 117 for other matmuls;
# 8192 x 57344 and 32 rows in 1.74 ms, 542 GB/s, and 516 and 529 for others. Attention: as the A100's, not measured.
A40_48G = Device(
    name="a40-48g",
    peak_flops_per_second=149.7e12,
    memory_bytes_per_second=696e9,
    memory_bytes=48 * GIB,
    compute_share=0.75,
    memory_share=0.76,
    attention_share=0.6,
    nvlink=Link(56.25e9, NVLINK_HOP_SECONDS),
    nvlink_gpus=2,
    pcie=PCIE_4,
    node_gpus=8,
)

# NVIDIA H100 data sheet (SXM): 989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s in both directions together.
# Shares: own measurement on one, of a bfloat16 matmul, 798 TFLOP/s, and of a copy, 3.0 TB/s: the best a kernel can do.
# Attention: FlashAttention-2 reaches 35 % (arXiv 2407.08608).
H100 = Device(
    name="h100",
    peak_flops_per_second=989e12,
    memory_bytes_per_second=3.35e12,
    memory_bytes=80 * GIB,
    compute_share=0.81,
    memory_share=0.9,
    attention_share=0.35,
    nvlink=Link(450e9, NVLINK_HOP_SECONDS),
    nvlink_gpus=8,
    pcie=PCIE_5,
    node_gpus=8,
)

# NVIDIA H200 data sheet: the H100 with 141 GB of memory at 4.8 TB/s. Shares as the H100's, not measured.
H200 = replace(H100, name="h200", memory_bytes_per_second=4.8e12, memory_bytes=int(141e9))

DEVICES = {device.name: device for device in (A100_80G, A100_80G_PAIRS, A40_48G, H100, H200)}


def find_device(name: str) -> Device:
    """Raises ConfigError, listing the known ones."""
    if name not in DEVICES:
        raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name]
