//! The `railhop` command as several processes, started as anything may start them: by variables.

#![cfg(all(feature = "cli", target_os = "linux"))]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/small.safetensors");
const RANKS: usize = 4;
const RANKS_PER_NODE: usize = 2;

/// The longest that anything here takes.
const LIMIT: Duration = Duration::from_secs(100);

/// The ranks of a 2×2 world under way. Those that are left are killed when it goes.
struct World(Vec<Child>);

impl World {
    /// Each rank runs `railhop` with what `arguments` says for it.
    fn start(arguments: impl Fn(usize) -> Vec<String>) -> Self {
        let store = free_address();
        let rank = |rank: usize| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_railhop"));
            let place = [
                ("RAILHOP_RANK", rank),
                ("RAILHOP_WORLD_SIZE", RANKS),
                ("RAILHOP_LOCAL_RANK", rank % RANKS_PER_NODE),
                ("RAILHOP_LOCAL_SIZE", RANKS_PER_NODE),
            ];
            command.envs(place.map(|(name, value)| (name, value.to_string())));
            command.env("RAILHOP_STORE", &store).env("RAILHOP_JOB_ID", &store).env_remove("RAILHOP_LOG");
            command.args(arguments(rank)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        Self((0..RANKS).map(rank).collect())
    }

    /// How all ranks end, by rank.
    fn end(mut self) -> Vec<Output> {
        let end = Instant::now() + LIMIT;
        for (rank, child) in self.0.iter_mut().enumerate() {
            while child.try_wait().unwrap().is_none() {
                assert!(Instant::now() < end, "rank {rank} does not end");
                thread::sleep(Duration::from_millis(10));
            }
        }
        // What they print is little and has fitted the pipes.
        self.0.drain(..).map(|child| child.wait_with_output().unwrap()).collect()
    }

    /// Sends a signal, by its name.
    fn signal(&self, rank: usize, signal: &str) {
        let pid = self.0[rank].id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Where nobody listens.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// `railhop replay` of the small trace, with these options.
fn replay(options: &[&str]) -> Vec<String> {
    let first = ["replay", TRACE, "--tokens-per-rank", "64"];
    let given = options.contains(&"--tokens-per-rank");
    let first = if given { &first[..2] } else { &first[..] };
    first.iter().chain(options).map(|word| word.to_string()).collect()
}

/// Waits until there is such a file.
fn wait_for(path: &Path) {
    let end = Instant::now() + LIMIT;
    while !path.exists() {
        assert!(Instant::now() < end, "{path:?} does not come");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Every one of `outputs` fails with exit code 1, nothing on stdout, and one line that contains all of `causes`.
#[track_caller]
fn refused<'a>(outputs: impl IntoIterator<Item = &'a Output>, causes: &[&str]) {
    for output in outputs {
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
        assert!(output.stdout.is_empty());
        let missing = causes.iter().find(|cause| !stderr.contains(**cause));
        assert_eq!(missing, None, "{stderr}");
    }
}

/// The JSON object that rank 0 prints; the others print nothing.
fn report(outputs: &[Output]) -> Value {
    for (rank, output) in outputs.iter().enumerate() {
        assert!(output.status.success(), "rank {rank}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout.is_empty(), rank > 0, "rank {rank}");
    }
    serde_json::from_slice(&outputs[0].stdout).unwrap()
}

#[test]
fn what_processes_get_is_what_threads_get() {
    for format in [&["--dtype", "bf16"][..], &["--dtype", "fp8", "--scales", "ue8m0"]] {
        let dir = tempfile::tempdir().unwrap();
        let dumps = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
        let (processes, threads) = (dumps("processes"), dumps("threads"));
        let world = World::start(|_| replay(&[format, &["--json", "--dump", &processes]].concat()));
        let world = report(&world.end());
        let alone = ["--nodes", "2", "--ranks-per-node", "2", "--json", "--dump", &threads];
        let alone =
            Command::new(env!("CARGO_BIN_EXE_railhop")).args(replay(&[format, &alone].concat())).output();
        let alone: Value = serde_json::from_slice(&alone.unwrap().stdout).unwrap();
        for part in ["rows_per_rank", "hops", "nodes", "ranks_per_node", "steps", "verified", "format"] {
            assert_eq!(world[part], alone[part], "{part}");
        }
        assert_eq!(files(&processes), files(&threads));
        assert_eq!(files(&processes).len(), 8 * RANKS);
    }
}

/// Names and contents, by name.
fn files(dir: &str) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let read =
        |entry: fs::DirEntry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
    let mut files: Vec<_> = entries.map(read).collect();
    files.sort();
    files
}

#[test]
fn a_bench_gathers_what_ranks_measure() {
    let small = "bench --tokens 8 --hidden 64 --experts 8 --topk 2 --iters 2 --json";
    let report = report(&World::start(|_| small.split(' ').map(Into::into).collect()).end());
    assert_eq!((&report["nodes"], &report["ranks_per_node"]), (&2.into(), &2.into()));
    assert_eq!((&report["channels"], &report["workers"]), (&1.into(), &1.into()));
    // By its variables, this world is on two machines: they have no memcpy in common.
    assert!(report["memcpy_gbs"].is_null() && report["speed_of_light"]["dispatch"].is_null());
    for phase in ["plan", "dispatch", "combine", "total"] {
        assert!(report[phase]["median_ms"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn worlds_of_another_size_are_refused() {
    let options = ["--nodes", "3", "--ranks-per-node", "2"];
    let what = "--nodes 3 --ranks-per-node 2 is a world of 6 ranks, but there are 4 processes";
    refused(&World::start(|_| replay(&options)).end(), &[what]);
    let one = World::start(|rank| replay(if rank == 1 { &options } else { &[] }));
    refused(&one.end(), &["rank 1: ", what]);
}

#[test]
fn ranks_that_differ_are_told_both_sides() {
    let other = |rank: usize, options: &'static [&'static str]| {
        World::start(move |this| replay(if this == rank { options } else { &[] })).end()
    };
    refused(&other(3, &["--channels", "2"]), &["rank 3 has", "2 channels", "rank 0 has", "1 channels"]);
    refused(&other(2, &["--dtype", "fp8"]), &["rank 2 has come for", "fp8", "rank 0 for", "bf16"]);
    refused(&other(1, &["--steps", "1:2"]), &["rank 1 has come for", "steps 1:2", "rank 0 for", "steps 0:8"]);
    let trace = World::start(|rank| {
        // A bit of a weight.
        let mut words = replay(&[]);
        if rank == 3 {
            let mut bytes = fs::read(TRACE).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("other.safetensors");
            fs::write(&path, bytes).unwrap();
            words[1] = path.to_str().unwrap().to_string();
        }
        words
    });
    refused(&trace.end(), &["rank 3 has come for", "rank 0 for"]);
    let bench = |hidden: &str| ["bench", "--hidden", hidden].map(String::from).to_vec();
    let benches = World::start(|rank| bench(if rank == 0 { "64" } else { "128" }));
    refused(&benches.end(), &["rank 1 has come for", "hidden 128", "rank 0 for", "hidden 64"]);
}

#[test]
fn a_rank_that_fails_ends_all_with_its_reason() {
    let world = World::start(|rank| {
        let mut words = replay(&[]);
        if rank == 2 {
            words[1] = "/nowhere/trace".into();
        }
        words
    });
    refused(&world.end(), &["rank 2: /nowhere/trace: can't read it"]);
    // The name of one dump is taken.
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("step1-rank3.safetensors")).unwrap();
    let world = World::start(|_| replay(&["--dump", dir.path().to_str().unwrap()]));
    refused(&world.end(), &["rank 3: step 1: "]);
    // The devices of one process are not those of all.
    refused(&World::start(|_| replay(&["--engine", "cuda"])).end(), &["--engine cuda", "--in-process"]);
}

/// Many short steps; each rank's dump of step `n` is in `dir` when it has done it.
fn long_replay(dir: &Path, deadline: &str) -> World {
    let options = ["--tokens-per-rank", "1", "--deadline-s", deadline, "--dump", dir.to_str().unwrap()];
    World::start(|_| replay(&options))
}

#[test]
fn a_killed_rank_is_named_by_all_others() {
    let dir = tempfile::tempdir().unwrap();
    for victim in [2, 0] {
        let dir = dir.path().join(victim.to_string());
        let world = long_replay(&dir, "50");
        wait_for(&dir.join(format!("step2-rank{victim}.safetensors")));
        let killed = Instant::now();
        world.signal(victim, "KILL");
        let outputs = world.end();
        assert!(killed.elapsed() < Duration::from_secs(50));
        let others = outputs.iter().enumerate().filter(|(rank, _)| *rank != victim);
        refused(others.map(|(_, output)| output), &[&format!("rank {victim}")]);
    }
}

#[test]
fn a_stopped_rank_is_named_within_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let world = long_replay(dir.path(), "3");
    wait_for(&dir.path().join("step2-rank1.safetensors"));
    world.signal(1, "STOP");
    let mut world = world;
    let end = Instant::now() + LIMIT;
    let others = [0, 2, 3];
    while others.iter().any(|&rank| world.0[rank].try_wait().unwrap().is_none()) {
        assert!(Instant::now() < end, "a rank waits for the stopped one for ever");
        thread::sleep(Duration::from_millis(10));
    }
    world.signal(1, "KILL");
    let outputs = world.end();
    let stderr = |rank: usize| String::from_utf8_lossy(&outputs[rank].stderr).into_owned();
    for rank in others {
        assert_eq!(outputs[rank].status.code(), Some(1), "{}", stderr(rank));
        assert!(stderr(rank).contains("rank 1 ") || stderr(rank).contains("ranks [1]"), "{}", stderr(rank));
    }
}

#[test]
fn threads_are_one_option_away() {
    let world = World::start(|_| replay(&["--in-process", "--steps", "0:1"]));
    for output in world.end() {
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stdout).contains("agrees with the oracle"));
    }
    let alone = Command::new(env!("CARGO_BIN_EXE_railhop")).args(replay(&["--processes"])).output().unwrap();
    // Unless the tests themselves have been started by a launcher.
    assert_eq!(alone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&alone.stderr).contains("no launcher found"));
}
