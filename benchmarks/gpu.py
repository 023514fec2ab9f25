"""Everything worth doing in a short visit to a GPU: build, tests, compute-sanitizer, benchmarks.

    python -m benchmarks gpu

Builds the ops for this GPU in place, runs the ops' tests with it, compute-sanitizer's memcheck and racecheck
on small shapes where it is installed, and the ops' benchmarks, whose rows go to
benchmarks/results/<gpu>-<date>.csv. Needs torch, pytest, ninja, pybind11 and a CUDA toolkit; takes at most
ten minutes. A step that fails does not stop the others, but is told at the end and in the exit status.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
OPS = ("mask_tokens", "packed_attention", "concat_mlp")
SANITIZER_TOOLS = ("memcheck", "racecheck")
WHOLE_VISIT_S = 590


def main(argv: list[str]) -> int:
    """Run all steps; 0 when none failed."""
    if not torch.cuda.is_available():
        print("python -m benchmarks gpu: torch sees no GPU here", file=sys.stderr)
        return 2
    if argv == ["--small-shapes"]:
        small_shapes()
        return 0
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}{'a' if major == 9 else ''}"
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architecture, "MTFAST_FORCE_CUDA_BUILD": "1"}
    tests = [ROOT / "tests" / f"test_{op}.py" for op in OPS]
    python = sys.executable
    # name, command, seconds it may take
    steps: list[tuple[str, list[str], int]] = [
        ("build", [python, "setup.py", "build_ext", "--inplace"], 180),
        ("tests", [python, "-m", "pytest", "-q", "-x", *map(str, tests)], 150),
    ]
    if sanitizer := find_sanitizer():
        for tool in SANITIZER_TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
            steps.append((tool, [*command, python, "-m", "benchmarks", "gpu", "--small-shapes"], 45))
    else:
        print("compute-sanitizer is not installed: its checks are left out")
    steps += [(f"benchmark {op}", [python, "-m", "benchmarks", op], 100) for op in OPS]
    end = time.monotonic() + WHOLE_VISIT_S
    failed = [
        name
        for name, command, limit in steps
        if not _passes(name, command, min(limit, end - time.monotonic()), environment)
    ]
    print(f"failed: {', '.join(failed)}" if failed else "all steps passed")
    return 1 if failed else 0


def find_sanitizer() -> str | None:
    """compute-sanitizer: on PATH or in the toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    return shutil.which("compute-sanitizer") or next((str(p) for p in places if p.exists()), None)


def small_shapes() -> None:
    """Every op once or twice on a few tokens, forward and backward: what compute-sanitizer watches."""
    from mtfast.ops import concat_mlp, mask_tokens, packed_attention_cls, packed_attention_qkv

    lengths = [1, 40, 0, 130, 17]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    total = sum(lengths)
    ids = torch.randint(1000, 30522, (total,), device="cuda")
    for strategy in ("exact", "bernoulli"):
        for subword in (None, torch.rand(30522, device="cuda") < 0.3):
            mask_tokens(
                ids,
                special_ids=[101],
                mask_token_id=103,
                vocab_size=30522,
                seed=1,
                cu_seqlens=cu_seqlens,
                strategy=strategy,
                subword=subword,
            )
    for dtype in (torch.bfloat16, torch.float32):
        qkv = torch.randn(total, 3, 2, 64, device="cuda", dtype=dtype, requires_grad=True)
        out = packed_attention_qkv(qkv, cu_seqlens, 130, dropout_p=0.1, seed=1)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()
        q, k, v = (torch.randn(n, 2, 64, device="cuda", dtype=dtype) for n in (len(lengths), total, total))
        q.requires_grad_()
        packed_attention_cls(q, k, v, cu_seqlens, 130, dropout_p=0.1, seed=1).sum().backward()
        u, v = (torch.randn(33, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
        weight1, bias1, weight2, bias2 = (
            torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
            for shape in ((96, 128), (96,), (2, 96), (2,))
        )
        concat_mlp(u, v, weight1, bias1, weight2, bias2, dropout_p=0.1, seed=1).sum().backward()
    torch.cuda.synchronize()


def _passes(name: str, command: list[str], limit: float, environment: dict[str, str]) -> bool:
    print(f"== {name}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    # Tests look at values that ops do not look at on a GPU otherwise; benchmarks must not wait for that.
    checks = {"MTFAST_CHECK_VALUES": "1"} if name == "tests" else {}
    try:
        status = subprocess.run(command, cwd=ROOT, env={**environment, **checks}, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        print(f"== {name}: stopped after {limit:.0f} s", flush=True)
        return False
    print(f"== {name}: exit status {status} after {time.monotonic() - started:.0f} s", flush=True)
    return status == 0
