#!/usr/bin/env python3
"""Time railhop against a plain MPI_Alltoallv program at the same shape, in alternation.

Both programs time themselves; this script builds them, runs them in turn and compares. railhop
runs as threads of one process, or with --processes as the peer does, under the same mpirun.
Standard library only. See README.md next to this file.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
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
# Between nodes the peer has TCP, as railhop does.
NODES_NETWORK = "10.78.0"
NODES_MPI_FLAGS = ("--oversubscribe", "--mca", "pml", "ob1", "--mca", "btl", "self,vader,tcp",
                   "--mca", "btl_vader_single_copy_mechanism", "cma",
                   "--mca", "mpi_yield_when_idle", "1",
                   "--mca", "btl_tcp_if_include", f"{NODES_NETWORK}.0/24",
                   "--mca", "oob_tcp_if_include", f"{NODES_NETWORK}.0/24")
# Nobody else is in that network.
STORE = f"{NODES_NETWORK}.1:20000"
RUN_LIMIT_S = 900


class Failure(Exception):
    """A problem to report in one line."""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in DEFAULT_SHAPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=positive, default=value)
    parser.add_argument("--processes", metavar="NxR", type=world,
                        help="railhop as processes too: N nodes of R ranks under the peer's "
                             "mpirun, several nodes in network namespaces (needs root)")
    parser.add_argument("--rate", help="limit of each node's link, as tc reads it")
    parser.add_argument("--iters", type=positive, default=20)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--split", action="store_true",
                        help="peer sends rows and metadata apart, saving its unpacking copy")
    parser.add_argument("--repo", type=Path, default=HERE.parent.parent,
                        help="railhop checkout (default: the one this file is in)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all results")
    parser.add_argument("--min-ratio", type=float, metavar="X",
                        help="fail if railhop's tokens/s over the peer's is below X")
    args = parser.parse_args()
    if args.processes:
        args.nodes, args.ranks_per_node = args.processes
    return args


def world(text):
    nodes, ranks_per_node = text.split("x")
    return positive(nodes), positive(ranks_per_node)


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


class Nodes:
    """Network namespaces on a switch of their own, as many as there are nodes."""

    def __init__(self, count, rate):
        self.count, self.rate = count, rate
        self.name = f"side-by-side-{os.getpid()}"
        self.folder = tempfile.TemporaryDirectory(prefix="side-by-side-")

    def __enter__(self):
        try:
            self.connect()
        except Failure:
            self.__exit__()
            raise
        os.environ |= {"SIDE_BY_SIDE_NODES": self.name, "SIDE_BY_SIDE_TMP": self.folder.name}
        return self

    def connect(self):
        switch = f"{self.name}-switch"
        self.ip(f"netns add {switch}")
        self.ip(f"-n {switch} link add switch mtu 9000 type bridge")
        self.ip(f"-n {switch} link set switch up")
        for node in range(self.count):
            name = f"{self.name}-{node}"
            self.ip(f"netns add {name}")
            self.ip(f"-n {switch} link add node{node} mtu 9000 type veth "
                    f"peer name eth0 mtu 9000 netns {name}")
            self.ip(f"-n {switch} link set node{node} master switch up")
            self.ip(f"-n {name} addr add {NODES_NETWORK}.{node + 1}/24 dev eth0")
            for device in ("eth0", "lo"):
                self.ip(f"-n {name} link set {device} up")
            for namespace, device in ((name, "eth0"), (switch, f"node{node}")):
                if self.rate:
                    limit = f"root tbf rate {self.rate} burst 256kb latency 50ms"
                    run(["tc", "-n", namespace, "qdisc", "add", "dev", device, *limit.split()],
                        HERE, capture=False)

    def __exit__(self, *_):
        for name in [f"{self.name}-{node}" for node in range(self.count)] + [f"{self.name}-switch"]:
            with contextlib.suppress(Failure):
                self.ip(f"netns del {name}")
        self.folder.cleanup()

    @staticmethod
    def ip(words):
        run(["ip", *words.split()], HERE, capture=False)


def on_nodes(nodes, args, program):
    """`program` as processes: on this machine, or from the first of the nodes on all of them."""
    ranks = args.nodes * args.ranks_per_node
    if nodes is None:
        return ["mpirun", *MPI_FLAGS, "-n", ranks, *program]
    hosts = [f"{NODES_NETWORK}.{node + 1}:{args.ranks_per_node}" for node in range(args.nodes)]
    start = ["--mca", "plm_rsh_agent", HERE / "on-node", "--mca", "plm_rsh_no_tree_spawn", "1",
             "-H", ",".join(hosts), "-x", f"RAILHOP_STORE={STORE}", "-n", ranks]
    command = ["mpirun", *NODES_MPI_FLAGS, *start, *program]
    return [HERE / "on-node", f"{NODES_NETWORK}.1", shlex.join(str(part) for part in command)]


def peer_command(peer, nodes, args):
    command = [peer, "--json"] + shape_options(args) + (["--split"] if args.split else [])
    return on_nodes(nodes, args, command)


def railhop_command(nodes, args):
    command = ["target/release/railhop", "bench", "--nodes", args.nodes, "--ranks-per-node",
               args.ranks_per_node, "--dtype", "bf16", "--json"] + shape_options(args)
    return on_nodes(nodes, args, command) if args.processes else command


def shape_options(args):
    return ["--tokens", args.tokens, "--hidden", args.hidden, "--experts", args.experts,
            "--topk", args.topk, "--iters", args.iters]


def run_json(name, command, repo):
    text = run(command, repo, capture=True)
    try:
        result = json.loads(text)
        for phase in PHASES:
            float(result[phase]["median_ms"]), float(result[phase]["p99_ms"])
        float(result["tokens_per_s"])
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"{name} did not print the expected JSON object ({error!r})") from error
    return result


def run_round(number, commands, repo):
    """One run of each; who goes first changes every round, so that drift favours neither."""
    names = list(commands) if number % 2 == 0 else list(reversed(commands))
    results = {name: run_json(name, commands[name], repo) for name in names}
    results["ratio"] = results["railhop"]["tokens_per_s"] / results["peer"]["tokens_per_s"]
    results["dispatch_combine_ratio"] = rows_ms(results["peer"]) / rows_ms(results["railhop"])
    return results


def rows_ms(result):
    return result["dispatch"]["median_ms"] + result["combine"]["median_ms"]


def print_round(number, results):
    print(f"round {number + 1}: railhop / peer tokens per second = {results['ratio']:.2f}")
    print(f"  {'':9}" + "".join(f"{phase + ' ms':>13}" for phase in PHASES)
          + f"{'tokens/s':>11}{'memcpy GB/s':>13}")
    for name in ("peer", "railhop"):
        result = results[name]
        times = "".join(f"{result[phase]['median_ms']:>13.2f}" for phase in PHASES)
        # Ranks on several machines have no memcpy in common.
        memcpy = f"{result['memcpy_gbs']:>13.1f}" if result["memcpy_gbs"] else ""
        print(f"  {name:9}{times}{result['tokens_per_s']:>11.0f}{memcpy}", flush=True)


def median_of(rounds, value):
    return statistics.median(value(results) for results in rounds)


def summarise(rounds, default_shape):
    summary = {
        "peer_total_ms": median_of(rounds, lambda r: r["peer"]["total"]["median_ms"]),
        "railhop_total_ms": median_of(rounds, lambda r: r["railhop"]["total"]["median_ms"]),
        "tokens_per_s_ratio": median_of(rounds, lambda r: r["ratio"]),
        "dispatch_combine_ratio": median_of(rounds, lambda r: r["dispatch_combine_ratio"]),
        "peer_ms_x_gbs": median_of(
            rounds, lambda r: r["peer"]["total"]["median_ms"] * r["peer"]["memcpy_gbs"]),
    }
    if default_shape:
        summary["peer_over_reference"] = (summary["peer_ms_x_gbs"]
                                          / (REFERENCE_MS * REFERENCE_GBS))
    for phase in ("dispatch", "combine"):
        if all(r["railhop"].get("speed_of_light", {}).get(phase) for r in rounds):
            summary[f"railhop_speed_of_light_{phase}"] = median_of(
                rounds, lambda r: r["railhop"]["speed_of_light"][phase])
    return summary


def print_summary(summary, rounds):
    print(f"medians over {rounds} rounds")
    print(f"  peer total               {summary['peer_total_ms']:.2f} ms")
    print(f"  railhop total            {summary['railhop_total_ms']:.2f} ms")
    print(f"  railhop / peer tokens/s  {summary['tokens_per_s_ratio']:.2f}")
    print(f"  dispatch + combine       {summary['dispatch_combine_ratio']:.2f} "
          "(peer's time / railhop's)")
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
    peer = build(repo)
    several = args.processes and args.nodes > 1
    rounds = []
    with Nodes(args.nodes, args.rate) if several else contextlib.nullcontext() as nodes:
        commands = {"peer": peer_command(peer, nodes, args),
                    "railhop": railhop_command(nodes, args)}
        for number in range(args.rounds):
            rounds.append(run_round(number, commands, repo))
            print_round(number, rounds[-1])
    shape = {name: getattr(args, name) for name in DEFAULT_SHAPE}
    summary = summarise(rounds, shape == DEFAULT_SHAPE and not args.processes)
    print_summary(summary, args.rounds)
    if args.json:
        report = {"shape": shape, "processes": bool(args.processes), "rate": args.rate,
                  "iters": args.iters, "peer_split": args.split,
                  "mpi_flags": NODES_MPI_FLAGS if several else MPI_FLAGS,
                  "summary": summary, "rounds": rounds}
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
