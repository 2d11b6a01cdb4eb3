"""Our backbone against transformers' DINOv3ViTModel on this machine's CPU: same weights, same pixels.

    python benchmarks/backbone.py [--model vits16] [--batches 8,16] [--rounds 9] [--threads 2]

transformers runs in its best usual setting (SDPA, eval, inference_mode, weights and pixels already in the
dtype). Both models run in turn in every round, so that whatever else the machine does hits both; the ratio
is the median of the rounds' ratios. Prints a Markdown table, the distance of outputs, and whether one and
two threads give the same bytes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "vision")]

import oracles  # noqa: E402
import transformers  # noqa: E402

from dinoray.vision.canonical import build  # noqa: E402
from dinoray.vision.variants import variant  # noqa: E402


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    has = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{name or platform.processor()} ({', '.join(has)})"


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vits16")
    parser.add_argument("--batches", default="8,16")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{processor()}, {args.threads} threads; torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__} (sdpa, eval, inference_mode)")
    print(f"{args.model}, {args.size} px, {args.rounds} interleaved rounds, medians\n")
    config = variant(args.model)
    theirs = oracles.hugging_face(config, seed=1)
    state = oracles.published(theirs)
    exact_pixels = torch.randn(2, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    exact = theirs(exact_pixels).last_hidden_state[:, config.num_prefix :]
    print("| dtype | batch | transformers ms | dinoray ms | dinoray img/s | transformers / dinoray |")
    print("|---|---|---|---|---|---|")
    notes = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        theirs = theirs.to(dtype)
        ours = build(config, state.__getitem__, dtype, "cpu")
        for batch in (int(b) for b in args.batches.split(",")):
            pixels = torch.randn(batch, 3, args.size, args.size).to(dtype)
            theirs(pixels), ours(pixels)  # warm up
            rounds = [
                (seconds(lambda: theirs(pixels)), seconds(lambda: ours(pixels)))  # noqa: B023
                for _ in range(args.rounds)
            ]
            them, us = (statistics.median(times) for times in zip(*rounds, strict=True))
            ratio = statistics.median(a / b for a, b in rounds)
            print(
                f"| {name} | {batch} | {them * 1e3:.0f} | {us * 1e3:.0f} | {batch / us:.1f} | {ratio:.2f} |"
            )
        rough = relative(theirs(exact_pixels).last_hidden_state[:, config.num_prefix :], exact)
        mine = relative(ours(exact_pixels).patches.flatten(1, 2), exact)
        notes.append(
            f"{name}: patches are {mine:.1e} from transformers' float32 (its own {name}: {rough:.1e}); "
            f"1 and 2 threads give {'the same' if same_bytes(ours, exact_pixels) else 'DIFFERENT'} bytes"
        )
    print("\n" + "\n".join(notes))


def same_bytes(model, pixels: torch.Tensor) -> bool:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        tokens = model(pixels)
        results.append(torch.cat((tokens.cls[:, None], tokens.patches.flatten(1, 2)), 1))
    torch.set_num_threads(before)
    return torch.equal(*results)


if __name__ == "__main__":
    main()
