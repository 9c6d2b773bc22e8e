//! Worlds of processes on devices: every rank is a process of its own, with a CUDA of its own that stands on the CPU shim
//! (`kernels/shim/cuda`). Nodes share memory by descriptor, hop 1 goes over TCP by way of the host.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))] // What the shim runs on.

mod common;

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use common::shim::cuda_folder;
use common::{BF16, Case, Ranks, bits, config, contents, small_kernels, within};
use railhop::bootstrap::{Bootstrap, Callback};
use railhop::error::{Cause, Fault, Reason};
use railhop::{
    Combine, Communicator, Config, EngineKind, Error, Network, ProcessWorld, Routing, RowFormat, RowShape,
    ScaleFormat,
};

/// As long as a loaded machine may need for the processes of a world.
const LIMIT: Duration = Duration::from_secs(100);

/// A deadline that no test lives to see.
const NEVER: Duration = Duration::from_secs(1000);

/// What a rank's process is told.
const FOLDER: &str = "RAILHOP_TEST_FOLDER";
const RANK: &str = "RAILHOP_TEST_RANK";

// ---- processes

/// Runs every rank of a world of so many nodes and ranks per node in a process of its own, which runs `body`; what became
/// of them, in rank order.
fn run(test: &str, ranks: usize, body: impl FnOnce(usize) + Send + 'static) -> Vec<Output> {
    if let Ok(rank) = env::var(RANK) {
        within(LIMIT, move || body(rank.parse().unwrap()));
        return Vec::new();
    }
    let folder = tempfile::tempdir().unwrap();
    let start = |rank| process(test, rank, folder.path()).spawn().unwrap();
    let children: Vec<Child> = (0..ranks).map(start).collect();
    children.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
}

fn process(test: &str, rank: usize, folder: &Path) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([test, "--exact", "--test-threads", "1", "--nocapture"]);
    command.env("LD_LIBRARY_PATH", cuda_folder()).env("RAILHOP_CACHE", folder);
    command.env(FOLDER, folder).env(RANK, rank.to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// All have passed, and their CUDA had nothing to complain of.
fn passed(outputs: &[Output]) {
    for (rank, Output { status, stdout, stderr }) in outputs.iter().enumerate() {
        let [said, complained] = [stdout, stderr].map(|text| String::from_utf8_lossy(text));
        assert!(status.success() && said.contains("1 passed"), "rank {rank}: {status}\n{said}{complained}");
        assert!(!complained.contains("libcuda:"), "rank {rank}: {complained}");
    }
}

/// What all ranks bring to the step `number`, by files in a folder.
fn exchange(
    folder: &Path,
    rank: usize,
    ranks: usize,
    number: usize,
    mine: &[u8],
) -> io::Result<Vec<Vec<u8>>> {
    let path = |rank: usize| folder.join(format!("{number}-{rank}"));
    let unfinished = folder.join(format!("unfinished-{rank}"));
    fs::write(&unfinished, mine)?;
    fs::rename(&unfinished, path(rank))?;
    let end = Instant::now() + LIMIT;
    let theirs = |rank| loop {
        match fs::read(path(rank)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < end => {
                thread::sleep(Duration::from_millis(2));
            }
            read => return read,
        }
    };
    (0..ranks).map(theirs).collect()
}

/// Joins as the rank that this process is.
fn join(config: &Config, rank: usize) -> Communicator {
    let (ranks, mut steps) = (config.topology().world_size(), 0..);
    let folder = env::var(FOLDER).unwrap();
    let gather = move |mine: &[u8]| exchange(Path::new(&folder), rank, ranks, steps.next().unwrap(), mine);
    ProcessWorld::join(&mut Callback::new(rank, ranks, gather), config.clone()).unwrap()
}

fn world(nodes: usize, ranks_per_node: usize, deadline: Duration) -> Config {
    let interface = Some(IpAddr::from(Ipv4Addr::LOCALHOST).into());
    let config = config(nodes, ranks_per_node).deadline(deadline);
    config
        .network(Network { interface, ..Network::default() })
        .build()
        .unwrap()
        .on(EngineKind::Cuda(small_kernels()))
}

// ---- what ranks do

/// Plan, dispatch, experts, combine; as the oracle says, and all that came of it.
fn outcome(comm: &mut Communicator, case: &Case) -> impl PartialEq + std::fmt::Debug + Send + use<> {
    let rank = comm.rank();
    let handle = comm.plan(case.routing(rank)).unwrap();
    let buffer = comm.recv_buffer(handle.num_recv_tokens(), case.shape).unwrap();
    let received = comm.dispatch(&handle, case.x(rank), buffer).unwrap().buffer;
    let y = case.experts(comm, &received);
    let combined = comm.combine(&handle, Combine::new(y)).unwrap();
    case.verify(rank, &handle, &received, &combined.x);
    (contents(&received), bits(&combined.x))
}

/// The world does what one on the host does, several times.
fn works(config: &Config, comm: &mut Communicator) {
    let fp8 = RowShape { hidden: 256, topk: 4, format: RowFormat::Fp8(ScaleFormat::F32) };
    for (seed, shape) in [BF16, fp8, BF16].into_iter().enumerate() {
        let case = Case::random(config, shape, 24, seed as u64);
        let mut expected = Ranks::on_host(config).at_once(|comm| outcome(comm, &case));
        assert_eq!(outcome(comm, &case), expected.swap_remove(comm.rank()));
    }
}

/// Who is to blame when this rank plans.
fn fault(comm: &mut Communicator, case: &Case) -> Fault {
    match comm.plan(case.routing(comm.rank())) {
        Err(Error::Fault(fault)) => (*fault).clone(),
        other => panic!("{other:?}"),
    }
}

/// Invalid input at one rank is an error of all.
fn refuses(config: &Config, comm: &mut Communicator) {
    let case = Case::regular(config, BF16, 6);
    let (rank, experts) = (comm.rank(), config.placement().num_experts());
    let mut wrong = case.ranks[1].topk_idx.to_vec();
    wrong[5] = experts as i64;
    let routing = case.routing(rank);
    let routing = if rank == 1 { Routing { topk_idx: &wrong, ..routing } } else { routing };
    let reason =
        Reason::ExpertOutOfRange { token: 1, k: 1, expert: experts as i64, num_experts: experts as u64 };
    let refused = comm.plan(routing).err();
    assert_eq!(refused, Some(Error::Refused { rank: 1, reason }));
}

fn works_in(test: &str, nodes: usize, ranks_per_node: usize) {
    passed(&run(test, nodes * ranks_per_node, move |rank| {
        let config = world(nodes, ranks_per_node, NEVER);
        let mut comm = join(&config, rank);
        works(&config, &mut comm);
        refuses(&config, &mut comm);
        comm.reset().unwrap();
        works(&config, &mut comm);
    }));
}

#[test]
fn a_node_works() {
    works_in("a_node_works", 1, 2);
}

#[test]
fn a_rail_works() {
    works_in("a_rail_works", 2, 1);
}

#[test]
fn nodes_work() {
    works_in("nodes_work", 2, 2);
}

/// A rank that stays away is a fault of the others, which all get over.
fn waits_end_in(test: &str, nodes: usize, ranks_per_node: usize) {
    passed(&run(test, nodes * ranks_per_node, move |rank| {
        let config = world(nodes, ranks_per_node, Duration::from_secs(2));
        let case = Case::regular(&config, BF16, 6);
        let mut comm = join(&config, rank);
        case.round_trip(&mut comm);
        if rank == 0 {
            let fault = fault(&mut comm, &case);
            assert_eq!((fault.rank, fault.reporter), (1, 0), "{fault:?}");
            assert_eq!(fault.cause, Cause::Deadline(config.deadline()), "{fault:?}");
        }
        // The other is told.
        while comm.fault().is_none() {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(comm.fault().unwrap().rank, 1);
        comm.reset().unwrap();
        case.round_trip(&mut comm);
    }));
}

#[test]
fn waits_end_on_a_node() {
    waits_end_in("waits_end_on_a_node", 1, 2);
}

#[test]
fn waits_end_along_a_rail() {
    waits_end_in("waits_end_along_a_rail", 2, 1);
}

/// Whoever waits for a rank that waits itself does not blame that, however late it was to begin with it.
#[test]
fn blame_follows_the_waits() {
    passed(&run("blame_follows_the_waits", 4, |rank| {
        let config = world(2, 2, Duration::from_secs(2));
        let case = Case::regular(&config, BF16, 6);
        let mut comm = join(&config, rank);
        case.round_trip(&mut comm);
        if rank < 3 {
            thread::sleep(Duration::from_millis(800) * rank as u32);
            assert_eq!(fault(&mut comm, &case).rank, 3);
        }
        while comm.fault().is_none() {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(comm.fault().unwrap().rank, 3);
        comm.reset().unwrap();
        case.round_trip(&mut comm);
    }));
}

/// Long before the deadline; and the others build another world.
#[test]
fn a_rank_that_is_killed_is_named() {
    let outputs = run("a_rank_that_is_killed_is_named", 4, |rank| {
        let config = world(2, 2, NEVER);
        let case = Case::regular(&config, BF16, 6);
        let mut comm = join(&config, rank);
        case.round_trip(&mut comm);
        if rank == 2 {
            // The others wait for it by then, or soon will.
            thread::sleep(Duration::from_millis(200));
            std::process::abort();
        }
        let fault = fault(&mut comm, &case);
        assert_eq!((fault.rank, &fault.cause), (2, &Cause::Departed), "{fault:?}");
        match comm.reset() {
            Err(Error::ResetIncomplete { missing, .. }) => assert_eq!(missing, [2]),
            other => panic!("{other:?}"),
        }
        let mut survivors = comm.group(&[0, 1, 3]).unwrap();
        let config = world(1, 3, NEVER);
        // Nobody leaves the old world while others have not come to its end.
        survivors.barrier(LIMIT).unwrap();
        let mut comm = ProcessWorld::join(&mut survivors, config.clone()).unwrap();
        Case::regular(&config, BF16, 6).round_trip(&mut comm);
    });
    for (rank, output) in outputs.into_iter().enumerate() {
        match rank {
            2 => assert_eq!(output.status.code(), None, "it has been killed"),
            _ => passed(&[output]),
        }
    }
}

/// What was done together is complete, and what it did not start is not waited for.
#[test]
fn a_rank_that_leaves_is_missed() {
    passed(&run("a_rank_that_leaves_is_missed", 2, |rank| {
        let config = world(2, 1, NEVER);
        let case = Case::regular(&config, BF16, 6);
        let mut comm = join(&config, rank);
        case.round_trip(&mut comm);
        if rank == 0 {
            let fault = fault(&mut comm, &case);
            assert_eq!((fault.rank, &fault.cause), (1, &Cause::Departed), "{fault:?}");
        }
    }));
}
