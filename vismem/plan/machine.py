"""GPUs by their data sheets: what they hold, and what of their peak rates a plan counts on."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import psutil
import torch

from vismem.errors import UserError

GIB = 2**30
CGROUP_LIMITS = tuple(map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")))
CONTEXT = 0.8 * GIB  # assumed: CUDA's context, and the workspaces of cuBLAS and NCCL
FRAGMENTS = 0.06  # assumed: of what lives, lost between blocks of torch's allocator
FLOP_SHARE, BANDWIDTH_SHARE = 0.5, 0.7  # assumed, of the data sheet's rates
TF32_SHARE = 0.5  # of bfloat16's rate, by the data sheets of all cards here
LAUNCH = 8e-6  # assumed: seconds of an operation, however small, run by Python without CUDA graphs


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind. Rates are of NVIDIA's data sheets, dense; `memory` is what torch says of such a card."""

    count: int
    name: str
    memory: float  # bytes
    bfloat16: float  # FLOP per second
    float32: float  # the same, of the products of float32 numbers
    bandwidth: float  # bytes per second

    @classmethod
    def named(cls, gpus: str) -> Self:
        """`8xH100`, or `8x80`: eight of them. UserError for another form, or a card that is not known here."""
        found = re.fullmatch(r"([1-9]\d*)x(\w+)", gpus)
        card = found and BY_GIGABYTES.get(found[2], found[2])
        if found is None or card not in CARDS:
            sizes = " or ".join(f"{size} ({name})" for size, name in BY_GIGABYTES.items())
            known = f"{', '.join(CARDS)}, or its memory in GB: {sizes}"
            raise UserError(f"--gpus {gpus}: give COUNTxCARD, such as 8xH100; CARD is one of {known}")
        return cls(int(found[1]), card, *CARDS[card])

    @classmethod
    def here(cls, count: int) -> Self:
        """`count` of this machine's GPUs, by the memory that the smallest has. Rates are those of an A100."""
        sizes = [torch.cuda.get_device_properties(device).total_memory for device in range(count)]
        return cls(count, torch.cuda.get_device_name(0), min(sizes), *CARDS["A100"][1:])

    def beside(self, dtype: str) -> Self:
        """The same with the rate of float32 products beside a base of this type, see `tf32_beside`."""
        return self if dtype == "float32" else replace(self, float32=TF32_SHARE * self.bfloat16)

    def seconds(self, flops: int, moved: int, kind: torch.dtype) -> float:
        """Of one operation: the longest of computing, of reading and writing its bytes, and of launching it."""
        rate = self.float32 if kind == torch.float32 else self.bfloat16
        return max(flops / (FLOP_SHARE * rate), moved / (BANDWIDTH_SHARE * self.bandwidth), LAUNCH)

    @property
    def usable(self) -> float:
        """Bytes of one GPU that tensors can have."""
        return (self.memory - CONTEXT) / (1 + FRAGMENTS)


def memory_limit() -> int:
    """Bytes of memory that this process may use: its control group's limit, a pod's, or else the machine's."""
    limits: list[int] = [psutil.virtual_memory().total]
    for file in CGROUP_LIMITS:
        if file.is_file() and (text := file.read_text().strip()).isdecimal():  # "max": none
            limits.append(int(text))
    return min(limits)


CARDS = {  # memory, bfloat16, float32 without TF32, bandwidth
    "L40S": (44.4 * GIB, 362e12, 91.6e12, 0.864e12),
    "A100": (79.1 * GIB, 312e12, 19.5e12, 2.039e12),  # of 80 GB
    "H100": (79.1 * GIB, 989e12, 67e12, 3.35e12),
    "H200": (139.8 * GIB, 989e12, 67e12, 4.8e12),
}
BY_GIGABYTES = {"80": "H100", "141": "H200"}  # for who knows a card by its memory; an A100 has to be named
