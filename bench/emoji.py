"""The embedded model end to end, in fresh processes: load, first picture, one picture, a sheet, memory."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.stats import quantile

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "a red heart", "a blue circle", "a green square", "a yellow star", "a smiling face", "a cat", "a dog",
    "a red car", "a rocket", "a pizza", "a house", "a tree", "a purple heart", "a sun", "a moon", "a fish",
)  # fmt: skip


def measure(device: str, quick: bool = False) -> dict[str, Any]:
    """Medians over fresh processes. {"failed": reason} if the model does not run.

    Keys in `_s` hold median and minimum in seconds, keys in `_bytes` the peak resident memory of a process
    that does that job alone; "torch alone" is what importing torch takes. `quick`: one process, times only.
    """
    names = {"torch": "torch_alone_peak_bytes", "one": "one_emoji_peak_bytes", "sheet": "16_emoji_peak_bytes"}
    jobs = [] if quick else list(names)
    try:
        runs = [_process("times", device, quick) for _ in range(1 if quick else 3)]
        peaks = {names[job]: _process(job, device, quick)["peak_bytes"] for job in jobs}
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"failed": str(error)}
    result: dict[str, Any] = {}
    for key in runs[0]:
        if key.endswith("_s"):
            samples = [s for run in runs for s in run[key]]
            result[key] = {"median": quantile(samples, 0.5), "min": min(samples), "samples": len(samples)}
    return result | peaks | {"dtype": runs[0]["dtype"]}


def _process(job: str, device: str, quick: bool) -> dict[str, Any]:
    """What `python -m bench.emoji JOB` found. Raises RuntimeError with the last line of its errors."""
    command = [
        sys.executable,
        "-m",
        "bench.emoji",
        job,
        "--device",
        device,
        "--repeats",
        "1" if quick else "5",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def child(job: str, device: str, repeats: int) -> dict[str, Any]:
    """The job, done in this process: "torch", "one" and "sheet" for their memory, "times" for the rest."""
    start = time.perf_counter()
    import torch

    torch_seconds = time.perf_counter() - start
    if job == "torch":
        torch.randn(8) @ torch.randn(8)
        return {"peak_bytes": peak_bytes()}
    start = time.perf_counter()
    from rfkernels.pipeline import Pipeline

    import_seconds = time.perf_counter() - start
    start = time.perf_counter()
    pipe = Pipeline.load("emoji", device=device)
    load_seconds = time.perf_counter() - start
    if job == "one":
        pipe(PROMPTS[0], steps=4)
        return {"peak_bytes": peak_bytes()}
    if job == "sheet":
        pipe(list(PROMPTS), steps=8)
        return {"peak_bytes": peak_bytes()}
    first = _seconds(lambda: pipe(PROMPTS[0], steps=4))
    return {
        "import_torch_s": [torch_seconds],
        "import_rfkernels_s": [import_seconds],
        "load_s": [load_seconds],
        "first_emoji_4_steps_s": [first],
        "one_emoji_4_steps_s": [_seconds(lambda: pipe(PROMPTS[0], steps=4)) for _ in range(repeats)],
        "16_emoji_8_steps_s": [
            _seconds(lambda: pipe(list(PROMPTS), steps=8)) for _ in range(max(1, repeats // 2))
        ],
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }


def _seconds(call) -> float:
    """Wall-clock seconds; a picture has left the GPU when it is returned."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes() -> int:
    """The most memory this process has held resident."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started us
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> int:
    """Prints the figures of one job as one line of JSON."""
    parser = argparse.ArgumentParser("python -m bench.emoji", description=__doc__)
    parser.add_argument("job", choices=("torch", "one", "sheet", "times"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps(child(args.job, args.device, args.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
