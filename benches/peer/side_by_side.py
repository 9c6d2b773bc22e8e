#!/usr/bin/env python3
"""Time railhop against a plain MPI_Alltoallv program at the same shape, in alternation.

Both programs time themselves; this script builds them, runs them in turn and compares.
Standard library only. See README.md next to this file.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PHASES = ("plan", "dispatch", "combine", "total")
DEFAULT_SHAPE = {"nodes": 2, "ranks_per_node": 4, "tokens": 512, "hidden": 7168,
                 "experts": 64, "topk": 8}
# An earlier recording of the peer at the default shape: 149 ms on a machine whose memcpy
# ran at 24 GB/s. Time x rate is the traffic an iteration costs, whatever the machine.
REFERENCE_MS = 149.0
REFERENCE_GBS = 24.0
# The fastest setting found for the peer: shared memory with one copy by the kernel (CMA),
# and waiting ranks that yield, without which more ranks than cores spin against each other.
MPI_FLAGS = ("--oversubscribe", "--mca", "pml", "ob1", "--mca", "btl", "self,vader",
             "--mca", "btl_vader_single_copy_mechanism", "cma",
             "--mca", "mpi_yield_when_idle", "1")
RUN_LIMIT_S = 900


class Failure(Exception):
    """A problem to report in one line."""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in DEFAULT_SHAPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=positive, default=value)
    parser.add_argument("--iters", type=positive, default=20)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--split", action="store_true",
                        help="peer sends rows and metadata apart, saving its unpacking copy")
    parser.add_argument("--repo", type=Path, default=HERE.parent.parent,
                        help="railhop checkout (default: the one this file is in)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all results")
    parser.add_argument("--min-ratio", type=float, metavar="X",
                        help="fail if railhop's tokens/s over the peer's is below X")
    return parser.parse_args()


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def require_mpi():
    missing = [tool for tool in ("mpicc", "mpirun") if shutil.which(tool) is None]
    if missing:
        raise Failure(f"{' and '.join(missing)} not found: install the Debian packages "
                      "openmpi-bin and libopenmpi-dev")


def run(command, cwd, capture):
    """Runs a command to its end; stderr goes through, so that warnings are seen."""
    # Open MPI refuses to run as root, as containers do, unless told twice.
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [str(part) for part in command]
    try:
        done = subprocess.run(command, cwd=cwd, env=env, text=True, timeout=RUN_LIMIT_S,
                              stdout=subprocess.PIPE if capture else None)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(str(error)) from error
    if done.returncode != 0:
        raise Failure(f"exit status {done.returncode} from: {' '.join(command)}")
    return done.stdout


def build(repo):
    peer = repo / "target" / "peer" / "mpi_alltoall"
    peer.parent.mkdir(parents=True, exist_ok=True)
    run(["mpicc", "-std=c11", "-O3", "-march=native", "-Wall", "-Wextra",
         "-o", peer, HERE / "mpi_alltoall.c"], repo, capture=False)
    run(["cargo", "build", "--release"], repo, capture=False)
    return peer


def peer_command(peer, args):
    command = ["mpirun", *MPI_FLAGS, "-n", args.nodes * args.ranks_per_node, peer, "--json"]
    return command + shape_options(args) + (["--split"] if args.split else [])


def railhop_command(args):
    return ["target/release/railhop", "bench", "--nodes", args.nodes, "--ranks-per-node",
            args.ranks_per_node, "--dtype", "bf16", "--json"] + shape_options(args)


def shape_options(args):
    return ["--tokens", args.tokens, "--hidden", args.hidden, "--experts", args.experts,
            "--topk", args.topk, "--iters", args.iters]


def run_json(name, command, repo):
    text = run(command, repo, capture=True)
    try:
        result = json.loads(text)
        for phase in PHASES:
            float(result[phase]["median_ms"]), float(result[phase]["p99_ms"])
        float(result["tokens_per_s"]), float(result["memcpy_gbs"])
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"{name} did not print the expected JSON object ({error!r})") from error
    return result


def run_round(number, commands, repo):
    """One run of each; who goes first changes every round, so that drift favours neither."""
    names = list(commands) if number % 2 == 0 else list(reversed(commands))
    results = {name: run_json(name, commands[name], repo) for name in names}
    results["ratio"] = results["railhop"]["tokens_per_s"] / results["peer"]["tokens_per_s"]
    return results


def print_round(number, results):
    print(f"round {number + 1}: railhop / peer tokens per second = {results['ratio']:.2f}")
    print(f"  {'':9}" + "".join(f"{phase + ' ms':>13}" for phase in PHASES)
          + f"{'tokens/s':>11}{'memcpy GB/s':>13}")
    for name in ("peer", "railhop"):
        result = results[name]
        times = "".join(f"{result[phase]['median_ms']:>13.2f}" for phase in PHASES)
        print(f"  {name:9}{times}{result['tokens_per_s']:>11.0f}{result['memcpy_gbs']:>13.1f}",
              flush=True)


def median_of(rounds, value):
    return statistics.median(value(results) for results in rounds)


def summarise(rounds, default_shape):
    summary = {
        "peer_total_ms": median_of(rounds, lambda r: r["peer"]["total"]["median_ms"]),
        "railhop_total_ms": median_of(rounds, lambda r: r["railhop"]["total"]["median_ms"]),
        "tokens_per_s_ratio": median_of(rounds, lambda r: r["ratio"]),
        "peer_ms_x_gbs": median_of(
            rounds, lambda r: r["peer"]["total"]["median_ms"] * r["peer"]["memcpy_gbs"]),
    }
    if default_shape:
        summary["peer_over_reference"] = (summary["peer_ms_x_gbs"]
                                          / (REFERENCE_MS * REFERENCE_GBS))
    for phase in ("dispatch", "combine"):
        if all(phase in r["railhop"].get("speed_of_light", {}) for r in rounds):
            summary[f"railhop_speed_of_light_{phase}"] = median_of(
                rounds, lambda r: r["railhop"]["speed_of_light"][phase])
    return summary


def print_summary(summary, rounds):
    print(f"medians over {rounds} rounds")
    print(f"  peer total               {summary['peer_total_ms']:.2f} ms")
    print(f"  railhop total            {summary['railhop_total_ms']:.2f} ms")
    print(f"  railhop / peer tokens/s  {summary['tokens_per_s_ratio']:.2f}")
    for phase in ("dispatch", "combine"):
        share = summary.get(f"railhop_speed_of_light_{phase}")
        if share is not None:
            print(f"  railhop speed of light   {share:.3f} ({phase})")
    line = f"  peer time x memcpy       {summary['peer_ms_x_gbs']:.0f} ms x GB/s"
    if "peer_over_reference" in summary:
        line += (f" = {summary['peer_over_reference']:.2f} of the recorded "
                 f"{REFERENCE_MS:.0f} ms x {REFERENCE_GBS:.0f} GB/s")
    print(line)


def compare(args):
    require_mpi()
    repo = args.repo.resolve()
    commands = {"peer": peer_command(build(repo), args), "railhop": railhop_command(args)}
    rounds = []
    for number in range(args.rounds):
        rounds.append(run_round(number, commands, repo))
        print_round(number, rounds[-1])
    shape = {name: getattr(args, name) for name in DEFAULT_SHAPE}
    summary = summarise(rounds, shape == DEFAULT_SHAPE)
    print_summary(summary, args.rounds)
    if args.json:
        report = {"shape": shape, "iters": args.iters, "peer_split": args.split,
                  "mpi_flags": MPI_FLAGS, "summary": summary, "rounds": rounds}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.min_ratio is not None and summary["tokens_per_s_ratio"] < args.min_ratio:
        raise Failure(f"ratio {summary['tokens_per_s_ratio']:.2f} is below {args.min_ratio}")


def main():
    try:
        compare(parse_args())
    except Failure as failure:
        print(f"side_by_side: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
