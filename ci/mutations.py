"""Plants bugs in copies of the kernels, one at a time, and expects the named check to catch each.

mutations.py TEST_PROGRAM: the test program of tests/kernels.rs. A mutation of kernels/shim/mutations.json replaces
`old` (which stands once in `file`) by `new`, runs `tests` on `flavour`, and must fail with `report` in what is printed.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
MUTANTS = ROOT / "target" / "shim" / "mutants"
# No mutant may hang the check.
LIMIT_S = 240


def plant(mutation, folder):
    """A copy of the kernels with one bug; the shim itself stays where it is."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("shim"))
    path = folder / mutation["file"]
    text = path.read_text()
    if text.count(mutation["old"]) != 1:
        raise ValueError(f"{mutation['old']!r} stands {text.count(mutation['old'])} times in {mutation['file']}")
    path.write_text(text.replace(mutation["old"], mutation["new"]))


def runtime(name):
    """The path of a library that belongs to the compiler."""
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def environment(flavour, library):
    """What the test program needs to run on a flavour of the shim."""
    extra = {"RAILHOP_SHIM": str(library), "RAILHOP_SEEDS": "6" if flavour == "plain" else "3", "RUST_BACKTRACE": "0"}
    if flavour == "tsan":
        extra |= {
            "LD_PRELOAD": runtime("libtsan.so"),
            "TSAN_OPTIONS": "exitcode=66 halt_on_error=1 ignore_noninstrumented_modules=1",
            "RAILHOP_TSAN_PER_WARP": "0",
            "RAILHOP_MOST_RANKS": "4",
        }
    return os.environ | extra


def check(mutation, program):
    """Why the mutation was not caught as it should be, or None."""
    name = re.sub(r"\W+", "-", mutation["name"])
    folder = MUTANTS / name
    try:
        plant(mutation, folder)
    except ValueError as error:
        return str(error)
    library = folder / "shim.so"
    build = subprocess.run(
        [KERNELS / "shim" / "build", mutation["flavour"], library, folder / "railhop.cu"], capture_output=True, text=True
    )
    if build.returncode:
        return f"does not build:\n{build.stderr[-2000:]}"
    try:
        run = subprocess.run(
            [program, "--test-threads", "1", mutation["tests"]],
            capture_output=True, text=True, errors="replace", timeout=LIMIT_S, cwd=ROOT,
            env=environment(mutation["flavour"], library),
        )
    except subprocess.TimeoutExpired:
        return f"ran for {LIMIT_S} s"
    output = run.stdout + run.stderr
    if run.returncode == 0:
        return "not caught"
    if not re.search(mutation["report"], output):
        return f"caught, but not by {mutation['report']!r}:\n{output[-2000:]}"
    shutil.rmtree(folder)
    return None


def main():
    program = pathlib.Path(sys.argv[1]).resolve()
    wanted = sys.argv[2:]
    mutations = [m for m in json.loads((KERNELS / "shim" / "mutations.json").read_text()) if not wanted or m["name"] in wanted]
    missed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutation, problem in zip(mutations, pool.map(lambda m: check(m, program), mutations)):
            print(f"{mutation['flavour']:5} {mutation['name']}: {problem or 'caught'}", flush=True)
            missed += problem is not None
    print(f"{len(mutations) - missed} of {len(mutations)} planted bugs caught")
    return missed != 0


if __name__ == "__main__":
    sys.exit(main())
