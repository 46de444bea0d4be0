"""The command line: `python -m bench`, `python -m bench compare A B`, `python -m bench report FILE`."""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace

ROOMS = (
    "solver",
    "guidance",
    "noise",
    "steps",
    "norm",
    "rope",
    "activation",
    "embedding",
    "linear",
    "attention",
    "models",
    "moe",
    "overhead",
    "emoji",
)
QUICK_SECONDS = 45.0  # no new case after this; no more compiling after half of it

HELP = """examples:
  python -m bench                                   every room
  python -m bench solver guidance --json new.json   two rooms, figures to a file
  python -m bench --quick                           under a minute, small sizes
  python -m bench compare old.json new.json --fail-above 5%
  python -m bench report new.json -o report.html    one file, no network (a name in .md gives text)
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 well, 1 slower than allowed, 2 wrong use."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["compare"]:
            from bench import compare

            return compare.main(argv[1:])
        if argv[:1] == ["report"]:
            from bench import report

            return report.main(argv[1:])
        return bench(argv)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
    except ImportError as error:
        print(f"bench: needs the compiled kernels, run pip install -e . first ({error})", file=sys.stderr)
    return 2


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a measuring run."""
    parser = argparse.ArgumentParser(
        "python -m bench",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rooms", nargs="*", metavar="room", help=f"any of {', '.join(ROOMS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE (- for stdout)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads of all sides; default: all cores")
    parser.add_argument("--seconds", type=float, help="how long a case is timed; default 5 (quick: 0.4)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--commit", help="the commit to note where there is no git")
    args = parser.parse_args(argv)
    if unknown := [room for room in args.rooms if room not in ROOMS]:
        raise ValueError(f"rooms are {', '.join(ROOMS)}; got {', '.join(unknown)}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    return args


def bench(argv: list[str]) -> int:
    """Measures the rooms and prints one line a case."""
    args = parse(argv)
    if args.threads:  # before torch starts its pool, and for every pool in the process
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can see; run with --device cpu")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")

    from bench import record

    run = measure_rooms(args, device, log=sys.stderr if args.json == "-" else sys.stdout)
    if args.json == "-":
        print(json.dumps(record.to_json(run)))
    elif args.json:
        record.save(run, args.json)
        print(f"figures: {args.json}")
    failed = [why for why in run.skipped.values() if why.startswith("failed")]
    return 1 if failed else 0


def measure_rooms(args: argparse.Namespace, device: str, log):
    """The `Run` of the rooms that `args` names; every case is printed to `log` when it is done."""
    import torch

    from bench import harness, machine, text
    from bench.record import Run

    started = time.perf_counter()
    plan = harness.plan_for(device, args.quick)
    plan = replace(plan, compile=not args.no_compile, seconds=args.seconds or plan.seconds)
    rooms = args.rooms or list(ROOMS)
    run = Run(
        device=device,
        date=machine.now(),
        command=machine.command(),
        commit=machine.commit(args.commit),
        machine=machine.machine(device),
        versions=machine.versions(),
        threads=torch.get_num_threads(),
        plan=asdict(plan) | {"quick": args.quick},
        copy_bytes=(64 << 20) if args.quick and device == "cpu" else (512 << 20),
    )
    run = replace(run, copy_start=harness.measure_copy(device, plan, run.copy_bytes))
    print(text.head(run), file=log, flush=True)
    deadline = started + QUICK_SECONDS if args.quick else None

    for room in rooms:
        if room == "overhead":
            run = _overhead(run, device, args.quick, log)
        elif room == "emoji":
            run = _emoji(run, device, args.quick, log)
        else:
            run = _room(run, room, device, args.quick, plan, deadline, log)
    run = replace(run, copy_end=harness.measure_copy(device, plan, run.copy_bytes))
    print(text.foot(run, time.perf_counter() - started), file=log, flush=True)
    return run


def _room(run, room: str, device: str, quick: bool, plan, deadline: float | None, log):
    """`run` with the cases of a kernel room."""
    from importlib import import_module

    from bench import harness, text

    module = import_module(f"bench.{room}")
    print(text.case_head(), file=log, flush=True)
    results, skipped = list(run.cases), dict(run.skipped)
    for case in module.cases(device, quick):
        left = deadline - time.perf_counter() if deadline else None
        if left is not None and left < 0:
            skipped[case.name] = "the time of --quick was spent"
            continue
        hurried = left is not None and left < QUICK_SECONDS / 2
        try:
            measured = harness.measure(case, device, replace(plan, compile=plan.compile and not hurried))
        except ValueError as error:  # a side that does not compute the formula: no figures for it
            skipped[case.name] = f"failed: {error}"
            print(f"  {case.name}: {skipped[case.name]}", file=log, flush=True)
            continue
        for result in measured:
            results.append(result)
            print(text.case_line(result), file=log, flush=True)
    return replace(run, cases=tuple(results), skipped=skipped)


def _overhead(run, device: str, quick: bool, log):
    """`run` with the cost of a call."""
    from bench import overhead, text

    stats = overhead.measure(device, quick)
    print(text.overhead(stats), file=log, flush=True)
    return replace(run, overhead=stats)


def _emoji(run, device: str, quick: bool, log):
    """`run` with the embedded model from load to picture."""
    from bench import emoji, text

    figures = emoji.measure(device, quick)
    print(text.emoji(figures), file=log, flush=True)
    if "failed" in figures:
        return replace(run, skipped=run.skipped | {"emoji": f"failed: {figures['failed']}"})
    return replace(run, emoji=figures)


if __name__ == "__main__":
    sys.exit(main())
