//! `railhop launch`: what ranks are told, what becomes of their lines, signals and failures, and that nothing stays
//! behind.

#![cfg(all(feature = "cli", target_os = "linux"))]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdout, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use railhop::bootstrap::{Launcher, Member};
use rustix::process::{Pid, Signal, geteuid, kill_process, kill_process_group};

/// As long as a loaded machine may need.
const LIMIT: Duration = Duration::from_secs(60);

/// Waits until `done` gives something.
#[track_caller]
fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(begun.elapsed() < LIMIT, "{what}: not in {LIMIT:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// `railhop launch` with these words, a group of its own as a shell would give it.
fn launch(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_railhop"));
    command.arg("launch").args(words).env_remove("RAILHOP_LOG").process_group(0);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A launcher that runs. It ends with the test.
struct Running {
    child: Child,
    /// What it says on stderr while ranks start: their processes, by rank.
    ranks: Vec<Pid>,
}

impl Running {
    /// Starts `ranks` ranks of a shell script, and waits until each of them has said `ready`.
    fn start(ranks: usize, options: &[&str], script: &str) -> Self {
        let count = ranks.to_string();
        let words = [&["-n", &count, "-v"], options, &["--", "sh", "-c", script]].concat();
        let mut child = launch(&words).spawn().unwrap();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let mut running = Self { child, ranks: Vec::new() };
        let starting = thread::spawn(move || read_start(ranks, out, err));
        until("all ranks are ready", || starting.is_finished().then_some(()));
        let (started, out, err) = starting.join().unwrap();
        running.ranks = started;
        running.child.stdout = Some(out);
        running.child.stderr = Some(err);
        running
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// How it has ended, and what it has said since all ranks were ready.
    fn ended(mut self) -> Ended {
        let status = until("the launcher ends", || self.child.try_wait().unwrap());
        let (mut out, mut err) = (String::new(), String::new());
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        Ended { code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap()), out, err }
    }
}

/// Reads the line that tells each rank's process, and the line by which each says that it is ready.
fn read_start(ranks: usize, out: ChildStdout, err: ChildStderr) -> (Vec<Pid>, ChildStdout, ChildStderr) {
    fn line(from: &mut impl BufRead) -> String {
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        line
    }
    let (mut out, mut err) = (BufReader::new(out), BufReader::new(err));
    let pid = |rank| {
        let line = line(&mut err);
        let pid = line.strip_prefix(&format!("rank {rank} is process ")).expect(&line);
        Pid::from_raw(pid.trim().parse().unwrap()).unwrap()
    };
    let pids = (0..ranks).map(pid).collect();
    for _ in 0..ranks {
        let line = line(&mut out);
        assert!(line.ends_with("] ready\n"), "{line:?}");
    }
    assert!(out.buffer().is_empty() && err.buffer().is_empty(), "ranks wait for what the test does");
    (pids, out.into_inner(), err.into_inner())
}

/// What has become of a launcher.
struct Ended {
    /// Its exit code, or 128 and the signal that ended it.
    code: i32,
    out: String,
    err: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The letter that tells what a process does; none if it is gone.
fn state(pid: Pid) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

fn has_ended(pid: Pid) -> bool {
    matches!(state(pid), None | Some('Z' | 'X'))
}

/// Runs to its end; what it said.
fn run(words: &[&str]) -> Output {
    finish(launch(words).spawn().unwrap())
}

fn finish(child: Child) -> Output {
    let pid = Pid::from_child(&child);
    let (done, ended) = std::sync::mpsc::channel();
    let waiter = thread::spawn(move || {
        let _ = done.send(child.wait_with_output().unwrap());
    });
    let output = ended.recv_timeout(LIMIT).unwrap_or_else(|_| {
        let _ = kill_process(pid, Signal::KILL);
        panic!("the launcher hangs");
    });
    waiter.join().unwrap();
    output
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// What each rank said, without the prefix.
fn by_rank(said: &[u8]) -> BTreeMap<usize, Vec<String>> {
    let mut ranks = BTreeMap::<usize, Vec<String>>::new();
    for line in text(said).lines() {
        let (rank, rest) = line.strip_prefix('[').and_then(|line| line.split_once("] ")).expect(line);
        ranks.entry(rank.parse().unwrap()).or_default().push(rest.into());
    }
    ranks
}

// ---- what ranks are told

/// What the ranks of a world find in their environment.
fn environments(options: &[&str], outer: &str) -> Vec<BTreeMap<String, String>> {
    let mut command = launch(&[options, &["--", "env"]].concat());
    command.envs(outer.split_whitespace().filter_map(|word| word.split_once('=')));
    let output = finish(command.spawn().unwrap());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let variables = |lines: Vec<String>| {
        lines.into_iter().filter_map(|line| line.split_once('=').map(|(k, v)| (k.into(), v.into()))).collect()
    };
    by_rank(&output.stdout).into_values().map(variables).collect()
}

#[test]
fn ranks_are_told_their_place_whatever_the_launcher_was_told() {
    let outer = "RANK=9 WORLD_SIZE=10 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_RANK=4 SLURM_PROCID=3 SLURM_LOCALID=3 \
        OMPI_COMM_WORLD_RANK=1 PMI_RANK=7 MPI_LOCALRANKID=0 RAILHOP_RANK=5 RAILHOP_INTERFACE=203.0.113.1 \
        RAILHOP_SECRET_FILE=/nowhere KEPT=yes";
    let ranks = environments(&["-n", "8", "--ranks-per-node", "4"], outer);
    assert_eq!(ranks.len(), 8);
    let members: Vec<_> = ranks
        .iter()
        .map(|variables| Member::from_lookup(|name| variables.get(name).cloned()).unwrap())
        .collect();
    for (rank, (member, variables)) in members.iter().zip(&ranks).enumerate() {
        let local = member.local.unwrap();
        let place = [member.rank, member.world_size, local.rank, local.size];
        assert_eq!(place, [rank, 8, rank % 4, 4]);
        assert_eq!(
            (member.launcher, &member.interface, &member.secret_file),
            (Launcher::Explicit, &None, &None)
        );
        assert_eq!((&member.store, &member.job_id), (&members[0].store, &members[0].job_id));
        assert_eq!(member.topology().unwrap().nodes(), 2);
        assert_eq!(variables["KEPT"], "yes");
    }
    assert_eq!(members[0].store.host, "127.0.0.1");
    assert_eq!(members[0].job_id.len(), 32);
    let next = environments(&["-n", "2"], outer);
    assert_eq!(next[0]["RAILHOP_LOCAL_SIZE"], "2");
    assert_ne!(next[0]["RAILHOP_JOB_ID"], members[0].job_id);
}

#[test]
fn worlds_that_can_not_be_are_refused() {
    for (words, code, reason) in [
        (
            &["-n", "8", "--ranks-per-node", "3", "true"][..],
            1,
            "ranks_per_node = 3: 8 ranks are not so many on each",
        ),
        (&["-n", "8", "--ranks-per-node", "0", "true"], 1, "ranks_per_node = 0"),
        (&["-n", "0", "true"], 1, "ranks_per_node = 0"),
        (&["-n", "65", "true"], 1, "ranks_per_node = 65"),
        (&["-n", "2"], 2, "PROGRAM"),
        (&["-n", "2", "--rate", "1gbit", "true"], 2, "--netns"),
        (&["-n", "2", "--grace", "soon", "true"], 2, "grace"),
    ] {
        let output = run(words);
        let complaint = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {complaint}");
        assert!(complaint.starts_with("error: ") && complaint.contains(reason), "{words:?}: {complaint}");
    }
}

// ---- lines

#[test]
fn lines_say_whose_they_are_on_both_streams() {
    let script = r"printf 'out\n\nlast'; printf 'err\n' >&2";
    let output = run(&["-n", "3", "--", "sh", "-c", script]);
    assert!(output.status.success());
    let all = |lines: &[&str]| {
        let lines: Vec<_> = lines.iter().map(ToString::to_string).collect();
        (0..3).map(|rank| (rank, lines.clone())).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(by_rank(&output.stdout), all(&["out", "", "last"]));
    assert_eq!(by_rank(&output.stderr), all(&["err"]));
    assert!(output.stdout.ends_with(b"\n"));
}

#[test]
fn lines_stay_whole_and_in_order() {
    // Each line comes in two pieces, from all ranks at once.
    let script =
        "i=0; while [ $i -lt 300 ]; do printf $RAILHOP_RANK-; printf \"$i-abc\\n\"; i=$((i+1)); done";
    let output = run(&["-n", "4", "--", "sh", "-c", script]);
    for (rank, lines) in by_rank(&output.stdout) {
        let expected: Vec<_> = (0..300).map(|line| format!("{rank}-{line}-abc")).collect();
        assert_eq!(lines, expected);
    }
}

#[test]
fn bytes_that_are_no_text_pass() {
    let output = run(&["-n", "1", "--", "printf", r"\377\000\376\n\200"]);
    assert_eq!(output.stdout, b"[0] \xff\0\xfe\n[0] \x80\n");
}

#[test]
fn without_prefix_nothing_is_touched() {
    let output = run(&["-n", "2", "--no-prefix", "--", "printf", "a"]);
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"aa"[..]));
}

#[test]
fn nothing_comes_from_stdin() {
    let mut command = launch(&["-n", "2", "--", "cat"]);
    command.stdin(Stdio::piped());
    assert!(finish(command.spawn().unwrap()).status.success());
}

// ---- the end

#[test]
fn the_first_failure_is_the_launchers() {
    for (script, code, reason) in [
        ("exit 0", 0, ""),
        ("test $RAILHOP_RANK = 1 || exec sleep 60; exit 7", 7, "rank 1 ended with exit code 7"),
        ("test $RAILHOP_RANK = 2 || exec sleep 60; kill -KILL $$", 137, "rank 2 was ended by SIGKILL"),
        ("test $RAILHOP_RANK = 0 || exec sleep 60; kill -SEGV $$", 139, "rank 0 was ended by SIGSEGV"),
        // Ranks that have ended well are no failures, whatever comes after them.
        ("test $RAILHOP_RANK = 2 || exit 0; sleep 0.3; exit 3", 3, "rank 2 ended with exit code 3"),
    ] {
        let output = run(&["-n", "3", "--", "sh", "-c", script]);
        let complaint = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{script}: {complaint}");
        let expected = if reason.is_empty() { String::new() } else { format!("error: {reason}\n") };
        assert_eq!(complaint, expected, "{script}");
    }
}

#[test]
fn a_program_that_can_not_be_started_is_named() {
    for (program, code) in [("no-such-program", 127), ("/no/such/program", 127), ("/etc", 126)] {
        let output = run(&["-n", "2", program]);
        assert_eq!(output.status.code(), Some(code));
        assert!(text(&output.stderr).starts_with(&format!("error: can't start {program:?} as rank 0: ")));
    }
}

#[test]
fn who_ignores_sigterm_is_killed_after_the_grace() {
    let script = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let running = Running::start(3, &["--grace", "0.4"], script);
    kill_process(running.ranks[1], Signal::USR1).unwrap();
    let Ended { code, err, .. } = running.ended();
    assert_eq!(code, 138, "{err}");
    for rank in [0, 2] {
        assert!(err.contains(&format!("rank {rank} was ended by SIGKILL")), "{err}");
    }
}

#[test]
fn who_heeds_sigterm_has_the_grace_to_end() {
    let script = "trap 'sleep 0.2; echo tidy; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
    let running = Running::start(3, &["--grace", "30"], script);
    kill_process(running.ranks[1], Signal::USR1).unwrap();
    let Ended { code, out, .. } = running.ended();
    assert_eq!(code, 138);
    let tidy = vec!["tidy".to_string()];
    assert_eq!(by_rank(out.as_bytes()), BTreeMap::from([(0, tidy.clone()), (2, tidy)]));
}

#[test]
fn what_ranks_leave_behind_ends_with_the_world() {
    let output = run(&["-n", "2", "--", "sh", "-c", "sleep 300 & echo $!"]);
    assert!(output.status.success());
    for lines in by_rank(&output.stdout).into_values() {
        let pid = Pid::from_raw(lines[0].parse().unwrap()).unwrap();
        until("it has ended", || has_ended(pid).then_some(()));
    }
}

#[test]
fn a_daemon_that_holds_a_ranks_output_holds_up_nobody() {
    let output = run(&["-n", "1", "--", "sh", "-c", "setsid sleep 300 & echo $!; echo last"]);
    assert!(output.status.success());
    let said = &by_rank(&output.stdout)[&0];
    assert_eq!(said[1], "last");
    // It has left the group, so it is the test's to end.
    let _ = kill_process(Pid::from_raw(said[0].parse().unwrap()).unwrap(), Signal::KILL);
}

// ---- signals

/// Counts the signals it gets for a while after the first.
fn counting(name: &str) -> String {
    format!(
        "trap 'n=$((n+1))' {name}; n=0; echo ready; while [ $n = 0 ]; do sleep 0.02; done; sleep 0.3; sleep 0.3; \
         echo $RAILHOP_RANK got $n"
    )
}

#[test]
fn signals_reach_every_rank_once() {
    for (signal, name) in [
        (Signal::INT, "INT"),
        (Signal::TERM, "TERM"),
        (Signal::HUP, "HUP"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
        (Signal::QUIT, "QUIT"),
    ] {
        let running = Running::start(3, &[], &counting(name));
        // As a terminal does it.
        kill_process_group(running.pid(), signal).unwrap();
        let Ended { code, out, .. } = running.ended();
        let said: BTreeSet<_> = out.lines().collect();
        assert_eq!(said, BTreeSet::from(["[0] 0 got 1", "[1] 1 got 1", "[2] 2 got 1"]), "{name}");
        assert_eq!(code, 0, "{name}");
    }
}

#[test]
fn ranks_that_end_by_a_signal_end_the_launcher_with_its_code() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::USR1, 138)] {
        let running = Running::start(2, &[], "echo ready; exec sleep 300");
        running.signal(signal);
        assert_eq!(running.ended().code, code);
    }
}

#[test]
fn a_signal_that_the_launcher_ignores_is_not_passed_on() {
    let mut command = Command::new("nohup");
    command.arg(env!("CARGO_BIN_EXE_railhop")).args(["launch", "-n", "1", "--", "sh", "-c"]);
    command.arg("kill -HUP $PPID; sleep 0.3; echo still here");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = finish(command.spawn().unwrap());
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "[0] still here\n"));
}

#[test]
fn all_stop_and_go_on_together() {
    let running = Running::start(2, &[], "echo ready; exec sleep 300");
    let all = || running.ranks.iter().copied().chain([running.pid()]);
    running.signal(Signal::TSTP);
    until("all have stopped", || all().all(|pid| state(pid) == Some('T')).then_some(()));
    running.signal(Signal::CONT);
    until("all go on", || all().all(|pid| state(pid) != Some('T')).then_some(()));
    running.signal(Signal::TERM);
    assert_eq!(running.ended().code, 143);
}

#[test]
fn a_rank_that_is_stopped_ends_with_the_others() {
    let running = Running::start(2, &[], "echo ready; exec sleep 300");
    kill_process(running.ranks[0], Signal::STOP).unwrap();
    kill_process(running.ranks[1], Signal::USR1).unwrap();
    assert_eq!(running.ended().code, 138);
}

#[test]
fn ranks_die_with_a_launcher_that_is_killed() {
    let mut running = Running::start(3, &[], "trap '' TERM HUP; echo ready; exec sleep 300");
    running.child.kill().unwrap();
    running.child.wait().unwrap();
    for &rank in &running.ranks {
        until("the rank has ended", || has_ended(rank).then_some(()));
    }
}

// ---- networks

/// Networks are made by one test at a time: each launcher removes what it finds left behind. None where they can't be
/// made; there it must say so.
fn networks() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    let has_command =
        Command::new("ip").arg("-V").output().is_ok() && Command::new("tc").arg("-V").output().is_ok();
    if geteuid().is_root() && has_command {
        return Some(ONE.lock().unwrap_or_else(PoisonError::into_inner));
    }
    let output = run(&["-n", "2", "--netns", "true"]);
    let complaint = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(complaint.contains("needs root") || complaint.contains("install iproute2"), "{complaint}");
    eprintln!("skipped: {complaint}");
    None
}

/// The namespaces of a launcher.
fn namespaces(launcher: Pid) -> BTreeSet<String> {
    let prefix = format!("railhop-{}-", launcher.as_raw_pid());
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| Some(name.strip_prefix(&prefix)?.to_string())).collect()
}

/// What `command` says in the network of a process.
fn inside(rank: Pid, command: &[&str]) -> String {
    let network = format!("--net=/proc/{}/ns/net", rank.as_raw_pid());
    let output = Command::new("nsenter").arg(network).args(command).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The network of a process, by name.
fn network_of(pid: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/net")).unwrap().display().to_string()
}

#[test]
fn each_node_has_a_network_of_its_own() {
    let Some(_alone) = networks() else { return };
    let options = ["--ranks-per-node", "2", "--netns", "--rate", "2gbit"];
    let running = Running::start(4, &options, "echo ready; exec sleep 300");
    let launcher = running.pid();
    assert_eq!(namespaces(launcher), BTreeSet::from(["0", "1", "switch"].map(String::from)));
    let networks = [0, 1, 2, 3].map(|rank: usize| network_of(&running.ranks[rank].as_raw_pid().to_string()));
    assert_eq!((&networks[0], &networks[2]), (&networks[1], &networks[3]));
    assert_eq!(BTreeSet::from([&networks[0], &networks[2], &network_of("self")]).len(), 3);
    for rank in [0, 2] {
        let pid = running.ranks[rank];
        let environment = fs::read_to_string(format!("/proc/{}/environ", pid.as_raw_pid())).unwrap();
        let (_, interface) = environment.split_once("RAILHOP_INTERFACE=").unwrap();
        let interface = interface.split('\0').next().unwrap();
        let device = inside(pid, &["ip", "addr", "show", "dev", "eth0"]);
        assert!(device.contains(&format!("inet {interface}/24")) && device.contains("mtu 9000"), "{device}");
        let limit = inside(pid, &["tc", "qdisc", "show", "dev", "eth0"]);
        assert!(limit.contains("tbf") && limit.contains("rate 2Gbit"), "{limit}");
    }
    let switch = format!("railhop-{}-switch", launcher.as_raw_pid());
    let output = Command::new("tc").args(["-n", &switch, "qdisc", "show", "dev", "node1"]).output().unwrap();
    assert!(text(&output.stdout).contains("rate 2Gbit"), "{}", text(&output.stdout));
    running.signal(Signal::TERM);
    assert_eq!(running.ended().code, 143);
    assert_eq!(namespaces(launcher), BTreeSet::new());
}

#[test]
fn a_network_that_can_not_be_made_leaves_nothing() {
    let Some(_alone) = networks() else { return };
    let child = launch(&["-n", "2", "--netns", "--rate", "fast", "true"]).spawn().unwrap();
    let launcher = Pid::from_child(&child);
    let output = finish(child);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("tbf rate fast"), "{}", text(&output.stderr));
    assert_eq!(namespaces(launcher), BTreeSet::new());
}

#[test]
fn what_a_killed_launcher_leaves_the_next_removes() {
    let Some(_alone) = networks() else { return };
    let options = ["--ranks-per-node", "1", "--netns"];
    let mut killed = Running::start(2, &options, "echo ready; exec sleep 300");
    let alive = Running::start(2, &options, "echo ready; exec sleep 300");
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    assert_eq!(namespaces(killed.pid()).len(), 3);
    assert!(run(&["-n", "1", "--netns", "true"]).status.success());
    assert_eq!(namespaces(killed.pid()).len(), 0);
    assert_eq!(namespaces(alive.pid()).len(), 3);
    alive.signal(Signal::INT);
    assert_eq!(alive.ended().code, 130);
}
