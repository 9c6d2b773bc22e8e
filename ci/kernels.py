#!/usr/bin/env python3
"""Compile the CUDA kernels and hold what comes out against kernels/golden.json. Needs no GPU.

ci/kernels installs the compilers and calls this. Standard library only.
"""

import argparse
import ctypes
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
SOURCE = KERNELS / "railhop.cu"
GOLDEN = KERNELS / "golden.json"
OUTPUT = ROOT / "target" / "cuda"

ARCHS = ("sm_90a", "sm_100a", "sm_120a")
# PTX for architectures without a cubin; it must assemble for the oldest and the newest.
PTX = "compute_90"
PTX_ON = ("sm_90", "sm_120")

FLAGS = ("-std=c++20", "-O3", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage")
WARNINGS_FAIL = ("-Werror", "all-warnings")

# An SM has four schedulers; each has 16384 registers and gives a warp whole eights a lane.
SCHEDULERS = 4
WARP_REGISTERS = 16384 // 32
MAX_WARPS = {"sm_90a": 64, "sm_100a": 64, "sm_120a": 48}


class Failure(Exception):
    """A problem to report in one line."""


# ---- compilers


class Toolkit:
    """A CUDA toolkit installed from wheels into a virtual environment."""

    def __init__(self, environment):
        found = sorted(environment.glob("lib/python3*/site-packages/nvidia/cu13"))
        if not found:
            raise Failure(f"no CUDA toolkit in {environment}: run ci/kernels")
        self.home = found[0]
        self.version = re.search(r"V([\d.]+)", checked([self.tool("nvcc"), "--version"]))[1]

    def tool(self, name):
        return str(self.home / "bin" / name)

    def library(self, name, mode=ctypes.DEFAULT_MODE):
        return ctypes.CDLL(str(self.home / "lib" / name), mode=mode)


def checked(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


# ---- what a compilation gives


@dataclass
class Usage:
    """What the assembler says of one function on one architecture."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    def local_memory(self):
        """What of it lies in local memory, in words; empty if nothing does."""
        parts = []
        if self.spill_stores or self.spill_loads:
            parts.append(f"spills {self.spill_stores} bytes, {self.spill_loads} bytes of loads")
        if self.stack:
            parts.append(f"has a stack of {self.stack} bytes")
        return parts


@dataclass
class Build:
    """One compilation: what the compiler said, and what it made."""

    name: str
    log: str
    ok: bool
    # By (function, architecture).
    usage: dict
    # Kernel to how often each instruction stands in it, operands left out.
    sass: dict = field(default_factory=dict)

    def failures(self):
        """What fails in any compilation: errors and local memory."""
        found = []
        if not self.ok:
            said = [line.strip() for line in self.log.splitlines() if "error" in line or "warning" in line]
            found += [f"{self.name}: does not compile: {line}" for line in said or [self.log.strip()]]
        elif not self.usage:
            found.append(f"{self.name}: no kernels in it")
        for (kernel, arch), usage in self.usage.items():
            found += [f"{self.name}: {kernel} on {arch} {what}" for what in usage.local_memory()]
        return found


def parse_usage(log):
    """The resources of every function, from the log of `ptxas -v`."""
    usage = {}
    arch = None
    current = Usage()
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            arch = found[2]
            usage[found[1], arch] = current = Usage()
        elif found := re.search(r"Function properties for (\S+)", line):
            # Functions that are called have no line of their own above.
            current = usage.setdefault((found[1], arch), Usage())
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack, current.spill_stores, current.spill_loads = map(int, found.groups())
        elif found := re.search(r"Used (\d+) registers", line):
            current.registers = int(found[1])
            for pattern, name in ((r"(\d+) bytes cumulative stack size", "stack"), (r"(\d+) bytes smem", "shared")):
                if found := re.search(pattern, line):
                    setattr(current, name, int(found[1]))
    return usage


def parse_sass(listing):
    kernels = {}
    for name, body in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", listing, re.DOTALL):
        instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
        kernels[name] = Counter(re.findall(instruction, body, re.MULTILINE))
    return kernels


def compile_cubin(toolkit, arch, source=SOURCE, flags=WARNINGS_FAIL, sass=True):
    name = f"nvcc {toolkit.version} {arch}"
    output = OUTPUT / f"{toolkit.version}-{arch}-{source.parent.name}-{source.stem}.cubin"
    target = f"arch={arch.replace('sm', 'compute')},code={arch}"
    build = run_nvcc(toolkit, name, ["-cubin", f"-gencode={target}", *flags], source, output)
    if build.ok and sass:
        build.sass = parse_sass(checked([toolkit.tool("cuobjdump"), "-sass", str(output)]))
    return build


def compile_ptx(toolkit, flags):
    name = f"nvcc {toolkit.version} {PTX}"
    targets = [f"-gencode=arch={PTX},code={code}" for code in (PTX, *PTX_ON)]
    output = OUTPUT / f"{toolkit.version}-{PTX}.fatbin"
    return run_nvcc(toolkit, name, ["-fatbin", *targets, *flags], SOURCE, output)


def run_nvcc(toolkit, name, options, source, output):
    command = [toolkit.tool("nvcc"), *FLAGS, *options, "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    return Build(name, log, done.returncode == 0, parse_usage(log))


def compile_nvrtc(toolkit, arch):
    """Compiles the source with the library that compiles at run time."""
    # Found by name only once it is loaded.
    toolkit.library("libnvrtc-builtins.so.13.0", ctypes.RTLD_GLOBAL)
    nvrtc = toolkit.library("libnvrtc.so.13")
    options = [
        "--std=c++20",
        f"--gpu-architecture={arch}",
        f"-I{KERNELS}",
        "--ptxas-options=-v",
    ]
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None)
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode(errors="replace")
    return Build(f"NVRTC {arch}", text, status == 0, parse_usage(text))


# ---- golden


def read_golden():
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"forbidden": {}, "kernels": {}}


def write_golden(golden):
    text = json.dumps(golden, indent=2, ensure_ascii=False)
    # Register counts on one line.
    text = re.sub(r'\{\s+("sm_[^{}]*?)\s+\}', lambda found: "{" + re.sub(r",\s+", ", ", found[1]) + "}", text)
    GOLDEN.write_text(text + "\n")


def updated(golden, version, builds):
    """Golden with the numbers of `builds`; kernels come and go, what they require and forbid stays."""
    kernels = {}
    measured = {kernel for build in builds.values() for kernel, _ in build.usage}
    for kernel in [*filter(measured.__contains__, golden["kernels"]), *sorted(measured - golden["kernels"].keys())]:
        if kernel not in golden["kernels"]:
            print(f"new: {kernel}; say in {GOLDEN.name} which instructions it requires and forbids")
        by_arch = {arch: build.usage[kernel, arch] for arch, build in builds.items()}
        entry = {"required": {}, "forbidden": {}, **golden["kernels"].get(kernel, {})}
        entry.pop("registers", None), entry.pop("shared", None)
        registers = {arch: usage.registers for arch, usage in by_arch.items()}
        shared = max(usage.shared for usage in by_arch.values())
        kernels[kernel] = {"registers": registers, "shared": shared, **entry}
    for kernel in golden["kernels"].keys() - measured:
        print(f"gone: {kernel}")
    rest = {name: value for name, value in golden.items() if name not in ("compiler", "kernels")}
    return {"compiler": version, **rest, "kernels": kernels}


def resident_warps(registers, arch):
    """Warps with that many registers a thread that an SM holds at once."""
    a_warp = -(-registers // 8) * 8
    return min(WARP_REGISTERS // a_warp * SCHEDULERS, MAX_WARPS[arch])


def judge(build, arch, golden):
    """What of a compilation for `arch` does not hold against golden."""
    failed = build.failures()
    kernels = golden["kernels"]
    measured = {kernel for kernel, of in build.usage if of == arch}
    failed += [f"{arch}: {kernel} is not in {GOLDEN.name}" for kernel in sorted(measured - kernels.keys())]
    failed += [f"{arch}: {kernel} is missing" for kernel in sorted(kernels.keys() - measured)]
    for kernel, bar in kernels.items():
        if kernel in measured:
            found = judge_usage(build.usage[kernel, arch], bar, arch)
            if build.ok:
                found += judge_sass(build.sass.get(kernel, Counter()), bar, golden["forbidden"])
            failed += [f"{arch}: {kernel} {what}" for what in found]
    return failed


def judge_usage(usage, bar, arch):
    found = []
    registers = bar["registers"].get(arch, 0)
    if usage.registers > registers:
        found.append(f"uses {usage.registers} registers, the bar is {registers}")
    if usage.shared != bar["shared"]:
        found.append(f"has {usage.shared} bytes of static shared memory, not {bar['shared']}")
    warps = resident_warps(usage.registers, arch)
    if warps < bar.get("warps", 0):
        found.append(f"fits an SM with {warps} warps, fewer than {bar['warps']}")
    return found


def judge_sass(instructions, bar, forbidden_everywhere):
    def matches(pattern):
        return fnmatch.filter(instructions, pattern)

    required = bar["required"].items()
    found = [f"lacks {pattern}: {why}" for pattern, why in required if not matches(pattern)]
    for pattern, why in {**forbidden_everywhere, **bar["forbidden"]}.items():
        for name in matches(pattern):
            found.append(f"has {instructions[name]} {name}: {why}")
    return found


def print_table(builds, golden):
    row = "{:<14} {:<8} {:>9} {:>4} {:>9} {:>7} {:>7} {:>6} {:>9}".format
    print(row("kernel", "arch", "registers", "bar", "warps/SM", "shared", "spills", "stack", "code"))
    for kernel in dict.fromkeys([*golden["kernels"], *(name for build in builds.values() for name, _ in build.usage)]):
        for arch, build in builds.items():
            usage = build.usage.get((kernel, arch))
            if usage is None:
                continue
            bar = golden["kernels"].get(kernel, {"registers": {}})["registers"].get(arch, "-")
            code = sum(build.sass.get(kernel, Counter()).values()) * 16 / 1024
            spills = usage.spill_stores + usage.spill_loads
            warps = resident_warps(usage.registers, arch)
            numbers = (usage.registers, bar, warps, usage.shared, spills, usage.stack, f"{code:.0f} KiB")
            print(row(kernel, arch, *numbers))


def print_warps(builds, golden):
    """Says how many warps an SM holds at least, of the kernels that have a bar for it."""
    for kernel, bar in golden["kernels"].items():
        least = [resident_warps(build.usage[kernel, arch].registers, arch)
                 for arch, build in builds.items() if (kernel, arch) in build.usage]
        if "warps" in bar and least:
            print(f"{kernel}: at least {min(least)} warps fit an SM on every architecture; {bar['warps']} must")


def print_slack(builds, golden):
    for arch, build in builds.items():
        for kernel, bar in golden["kernels"].items():
            usage = build.usage.get((kernel, arch))
            if usage and usage.registers < bar["registers"].get(arch, 0):
                print(f"note: {kernel} on {arch} is below its bar; ci/kernels --update lowers it")


# ---- showing that the check can fail

PLANTED = r"""
extern "C" __global__ void stacked(int* p, int n) {
    int a[64];
    for (int i = 0; i < 64; i++) a[i] = p[i];
    for (int i = 0; i < n; i++) a[p[i] & 63] += 1;
    p[0] = a[n];
}
extern "C" __global__ void trapping(int* p) { if (p[0]) asm volatile("trap;"); }
extern "C" __global__ void fused(float* p) { p[0] = p[1] * p[2] + p[3]; }
extern "C" __global__ void weak(unsigned long long* p) { p[0] = p[1]; }
extern "C" __global__ void shares(int* p) {
    __shared__ int a[32];
    a[threadIdx.x] = p[0];
    __syncthreads();
    p[threadIdx.x] = a[31 - threadIdx.x];
}
extern "C" __global__ void hungry(int* p) { p[0] = p[1]; }
extern "C" __global__ void wide(int* p) { p[0] = p[1]; }
extern "C" __global__ void unlisted(int* p) { p[0] = p[1]; }
"""

# What the check says of each.
COMPLAINTS = (
    r"stacked on \w+ has a stack of 256 bytes",
    r"stacked has \d+ STL",
    r"trapping has 1 BPT",
    r"fused has 1 FFMA",
    r"weak lacks LDG\.E\.64\.STRONG\.SYS",
    r"shares has 128 bytes of static shared memory",
    r"hungry uses \d+ registers, the bar is 2",
    r"wide fits an SM with \d+ warps, fewer than 65",
    r"unlisted is not in golden",
    r"vanished is missing",
)


def planted_golden(arch, everywhere):
    def entry(registers=255, **more):
        return {"registers": {arch: registers}, "shared": 0, "required": {}, "forbidden": {}, **more}

    return {"forbidden": everywhere, "kernels": {
        "stacked": entry(),
        "trapping": entry(),
        "fused": entry(forbidden={"FFMA*": "planted"}),
        "weak": entry(required={"LDG.E.64.STRONG.SYS": "planted"}),
        "shares": entry(),
        "hungry": entry(registers=2),
        "wide": entry(warps=65),
        "vanished": entry(),
    }}


def self_test(toolkit, workers, golden, arch="sm_90a"):
    """What the check should have said of planted faults, and did not."""
    folder = OUTPUT / "self-test"
    shutil.rmtree(folder, ignore_errors=True)
    # The kernels themselves, allowed so few registers that they must spill.
    spilling = folder / "spilling"
    shutil.copytree(KERNELS, spilling)
    squeezed = 0
    for path in spilling.glob("*.cu*"):
        text, count = re.subn(r"__launch_bounds__\([^)]*\)", "__launch_bounds__(1024, 2)", path.read_text())
        path.write_text(text)
        squeezed += count
    if not squeezed:
        return ["no launch bounds in the kernels to squeeze"]
    planted, warned = folder / "planted.cu", folder / "warned.cu"
    planted.write_text(PLANTED)
    warned.write_text('extern "C" __global__ void warned(int* p) { int unused; p[0] = 1; }\n')

    jobs = (spilling / SOURCE.name, WARNINGS_FAIL), (planted, ()), (warned, WARNINGS_FAIL)
    builds = list(workers.map(lambda job: compile_cubin(toolkit, arch, *job), jobs))
    said = [
        builds[0].failures(),
        judge(builds[1], arch, planted_golden(arch, golden["forbidden"])),
        builds[2].failures(),
    ]
    squeeze = (r"combine on \w+ spills [1-9]", r"does not compile: .*spilled")
    expected = squeeze, COMPLAINTS, (r"does not compile: .*unused",)
    missed = []
    for lines, patterns in zip(said, expected):
        missed += [f"said nothing of: {pattern}" for pattern in patterns
                   if not any(re.search(pattern, line) for line in lines)]
    count = sum(map(len, expected))
    print(f"self-test: {count - len(missed)} of {count} planted faults reported")
    return [f"self-test: {what}" for what in missed]


# ---- modes


def update(pinned, workers):
    builds = compile_archs(pinned, workers)
    broken = [what for build in builds.values() for what in build.failures()]
    if broken:
        return broken
    golden = updated(read_golden(), pinned.version, builds)
    write_golden(golden)
    print_table(builds, golden)
    return [what for arch, build in builds.items() for what in judge(build, arch, golden)]


def compile_archs(toolkit, workers):
    return dict(zip(ARCHS, workers.map(lambda arch: compile_cubin(toolkit, arch), ARCHS)))


def check(pinned, newest, workers):
    golden = read_golden()
    if pinned.version != golden.get("compiler"):
        return [f"{GOLDEN.name} is of nvcc {golden.get('compiler')}, this is {pinned.version}"]
    others = [
        workers.submit(compile_nvrtc, pinned, ARCHS[0]),
        workers.submit(compile_ptx, pinned, WARNINGS_FAIL),
        # What a compiler yet unknown warns of need not be right.
        workers.submit(compile_ptx, newest, ()),
        *(workers.submit(compile_cubin, newest, arch, flags=(), sass=False) for arch in ARCHS),
    ]
    builds = compile_archs(pinned, workers)
    failed = [what for arch, build in builds.items() for what in judge(build, arch, golden)]
    print_table(builds, golden)
    print_warps(builds, golden)
    print_slack(builds, golden)
    for job in others:
        build = job.result()
        broken = build.failures()
        print(f"{build.name}: {'failed' if broken else 'compiles, no spills'}")
        failed += broken
    return failed + self_test(pinned, workers, golden)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("pinned", "newest"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="VENV", help=f"where the {name} compiler is")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--update", action="store_true", help="rewrite the measured numbers")
    mode.add_argument("--self-test", action="store_true", help="only show that the check can fail")
    return parser.parse_args()


def main():
    args = parse_args()
    began = time.monotonic()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    pinned = Toolkit(args.pinned)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        if args.update:
            failed = update(pinned, workers)
        elif args.self_test:
            failed = self_test(pinned, workers, read_golden())
        else:
            failed = check(pinned, Toolkit(args.newest), workers)
    print(f"{time.monotonic() - began:.0f} s")
    for what in failed:
        print(f"failed: {what}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"failed: {failure}")
