//! Worlds that real launchers start: `railhop launch`, Open MPI's `mpirun`, Slurm's `srun`. Each starts this test program
//! as its ranks. Those that are not installed are skipped; `ci/setup` installs them.

#![cfg(all(feature = "cli", target_os = "linux"))]

use std::collections::BTreeSet;
use std::env;
use std::process::Command;
use std::time::Duration;

use railhop::bootstrap::{Bootstrap, Member, Store, StoreConfig};
use rustix::process::geteuid;

/// As long as a loaded machine may need to form a world.
const LIMIT: Duration = Duration::from_secs(60);

/// What ranks must agree on.
const LAYOUT: u64 = 42;

#[test]
#[ignore = "what launchers start"]
fn a_rank() {
    let member = Member::from_environment().unwrap();
    let topology = member.topology().unwrap();
    let mut store = Store::connect(&StoreConfig::of(&member, LAYOUT, LIMIT).unwrap()).unwrap();
    for round in 0..3 {
        let part = |rank: usize| vec![rank as u8; rank + round];
        let parts = store.all_gather(&part(member.rank), LIMIT).unwrap();
        assert_eq!(parts, (0..member.world_size).map(part).collect::<Vec<_>>());
    }
    store.barrier(LIMIT).unwrap();
    let (nodes, each) = (topology.nodes(), topology.ranks_per_node());
    println!("\nrank {} met {nodes}×{each} by {}", member.rank, member.launcher);
}

/// Has `launcher` (with its options) start eight ranks, which all meet in a world of this shape.
#[track_caller]
fn meet(launcher: &[&str], shape: &str) {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "120"]).args(launcher);
    command.arg(env::current_exe().unwrap()).args(["--exact", "a_rank", "--ignored", "--nocapture"]);
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    let output = command.output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    let met: BTreeSet<_> = out.lines().filter_map(|line| Some(&line[line.find("rank ")?..])).collect();
    let met: BTreeSet<_> = met.into_iter().filter(|line| line.contains(" met ")).collect();
    let expected: Vec<_> = (0..8).map(|rank| format!("rank {rank} met {shape}")).collect();
    assert_eq!(met, expected.iter().map(String::as_str).collect(), "{out}\n{err}");
}

/// Whether there is such a command; a message, if not.
fn is_installed(command: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {command}")]).output();
    let is_there = found.is_ok_and(|output| output.status.success());
    if !is_there {
        eprintln!("skipped: {command} is not installed");
    }
    is_there
}

fn is_root() -> bool {
    let is_root = geteuid().is_root();
    if !is_root {
        eprintln!("skipped: it needs root");
    }
    is_root
}

const RAILHOP: &str = env!("CARGO_BIN_EXE_railhop");

#[test]
fn railhop_launch() {
    meet(&[RAILHOP, "launch", "-n", "8", "--ranks-per-node", "4", "--"], "2×4 by RAILHOP_RANK");
}

#[test]
fn railhop_launch_with_networks() {
    if is_root() && is_installed("ip") && is_installed("tc") {
        let options = ["-n", "8", "--ranks-per-node", "2", "--netns", "--rate", "1gbit", "--"];
        meet(&[&[RAILHOP, "launch"], &options[..]].concat(), "4×2 by RAILHOP_RANK");
    }
}

#[test]
fn mpirun() {
    if is_installed("mpirun") {
        meet(&["mpirun", "--oversubscribe", "-n", "8"], "1×8 by Open MPI");
    }
}

#[test]
fn railhop_launch_within_mpirun() {
    // The innermost launcher counts, and the one outside must not tell it otherwise.
    if is_installed("mpirun") {
        let outer = ["mpirun", "--oversubscribe", "-n", "1"];
        let inner = [RAILHOP, "launch", "-n", "8", "--ranks-per-node", "8", "--no-prefix", "--"];
        meet(&[&outer[..], &inner].concat(), "1×8 by RAILHOP_RANK");
    }
}

#[test]
fn srun() {
    if is_root() && is_installed("srun") && is_installed("munged") {
        let cluster = concat!(env!("CARGO_MANIFEST_DIR"), "/ci/slurm");
        meet(&[cluster, "srun", "-N4", "-n8"], "4×2 by Slurm");
    }
}
