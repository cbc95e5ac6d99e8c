"""A little of everything on the GPU, for compute-sanitizer: one image and one sequence, each dtype, each kind of team."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu_checks import DTYPES, HELD_OFF, request
from fastgen.backends.cuda import CudaExecutor
from tests.oracle import by_name, compile_case

CASES = ("unet-pixelcnnpp", "wavenet-vocoder")
TEAMS = ("cluster16", "grid", "cta")
SAMPLES = 3


def main() -> int:
    if not torch.cuda.is_available():
        print("bench/gpu_small.py: no CUDA device can be used")
        return 2
    for case in by_name(*CASES):
        sampler = compile_case(case)
        conditioning = sampler.conditioning
        for name, dtype in DTYPES.items():
            for team in TEAMS:
                try:
                    executor = CudaExecutor(sampler.programs, conditioning, dtype, torch.device("cuda"), team)
                except ValueError as error:
                    if HELD_OFF not in str(error):
                        raise
                    print(f"{case} {name} {team}: {error}")
                    continue
                values, _ = executor.run(request(case, SAMPLES))
                print(f"{case} {name} {team}: {executor.rung(SAMPLES)['text']}, sum {float(values.cpu().sum()):.6g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
