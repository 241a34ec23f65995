"""What a device reaches in a large bf16 matrix product: the speed that an MFU is a share of."""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import torch


def matmul_peak(size: int, repeats: int = 20) -> float:
    """Median TFLOP/s of products of two [size, size] matrices in bf16, on the GPU where one is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        _finish(device)
        began = time.perf_counter()
        a @ b
        _finish(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / median(seconds[3:]) / 1e12


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    driver = torch.version.cuda
    print(json.dumps({"device": name, "cuda": driver, "tflops": round(matmul_peak(int(sys.argv[1])), 4)}))
