//! One rank of a world of processes: an MoE layer's dispatch and combine on a few tokens, checked by a formula.
//!
//! README.md says how it is started by torchrun, srun, mpirun or ssh. Started by none of them it is a small world in one
//! process.

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use half::bf16;
use railhop::bootstrap::{BootstrapError, Member, Store, StoreConfig};
use railhop::{
    Combine, Communicator, Config, LocalWorld, Network, ProcessWorld, Routing, RowFormat, RowShape, Topology,
    wire,
};

const TOKENS: usize = 16;
const HIDDEN: usize = 256;
const TOPK: usize = 4;
const EXPERTS_PER_RANK: usize = 4;

/// The longest that a rank waits for another.
const DEADLINE: Duration = Duration::from_secs(30);

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    let lines = match Member::from_environment() {
        Err(BootstrapError::NoLauncher) => threads(),
        member => member.map_err(Failure::from).and_then(|member| Ok(vec![process(&member)?])),
    };
    match lines {
        Ok(lines) => {
            lines.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// This process as one rank of the launcher's world.
fn process(member: &Member) -> Result<String, Failure> {
    let mut store = Store::connect(&StoreConfig::of(member, wire::layout(), DEADLINE)?)?;
    // Channels are the same on all ranks, whatever their machines; workers are this rank's own.
    let network = Network { interface: member.interface.clone(), ..Network::default() };
    let topology = member.find_topology(&mut store, DEADLINE)?;
    let config = config(topology)?.network(network).channels(1).worker_budget(1);
    let config = config.chunk_tokens(Network::CHUNK_TOKENS).ring_slots(Network::RING_SLOTS).build()?;
    let communicator = ProcessWorld::join(&mut store, config)?;
    let line = layer(communicator)?;
    Ok(format!("{line}, process {}, started by {}", std::process::id(), member.launcher))
}

/// Without a launcher: two nodes of two ranks in this process.
fn threads() -> Result<Vec<String>, Failure> {
    println!("no launcher found: two nodes of two ranks in one process");
    LocalWorld::new(config(Topology::new(2, 2)?)?.build()?)?.run(layer).into_iter().collect()
}

fn config(topology: Topology) -> Result<railhop::ConfigBuilder, Failure> {
    let builder = Config::builder(topology).experts(EXPERTS_PER_RANK * topology.world_size());
    Ok(builder.max_hidden(HIDDEN).max_topk(TOPK).pool_bytes(64 << 20).deadline(DEADLINE))
}

/// Every element of a token is its value: small integers, so that all sums are exact.
fn value(rank: usize, token: usize) -> f32 {
    (1 + (7 * rank + token) % 16) as f32
}

/// The experts of a token: some on this rank, some on others.
fn experts_of(rank: usize, token: usize, experts: usize) -> [usize; TOPK] {
    std::array::from_fn(|k| (rank * EXPERTS_PER_RANK + token + k * (experts / TOPK)) % experts)
}

/// One rank's layer. Its experts return their rows as they are, so a token comes home times the number of ranks that it
/// was on.
fn layer(mut comm: Communicator) -> Result<String, Failure> {
    let (rank, topology) = (comm.rank(), comm.config().topology());
    let experts = comm.config().placement().num_experts();
    let topk_idx: Vec<i64> =
        (0..TOKENS).flat_map(|token| experts_of(rank, token, experts)).map(|expert| expert as i64).collect();
    let routing = Routing { topk: TOPK, topk_idx: &topk_idx, topk_weights: &[0.25; TOKENS * TOPK] };
    let shape = RowShape { hidden: HIDDEN, topk: TOPK, format: RowFormat::Bf16 };
    let x: Vec<bf16> = (0..TOKENS).flat_map(|token| [bf16::from_f32(value(rank, token)); HIDDEN]).collect();

    let handle = comm.plan(routing)?;
    let rows = handle.num_recv_tokens();
    let buffer = comm.recv_buffer(rows, shape)?;
    let received = comm.dispatch(&handle, x, buffer)?.buffer;
    for (row, source) in received.bf16().chunks(HIDDEN).zip(received.sources()) {
        check(row, value(source.rank as usize, source.token as usize), "received")?;
    }
    let combined = comm.combine(&handle, Combine::new(received))?.x;
    for (token, row) in combined.chunks(HIDDEN).enumerate() {
        let mut ranks =
            experts_of(rank, token, experts).map(|expert| comm.config().placement().rank_of(expert));
        ranks.sort_unstable();
        let distinct = ranks.chunk_by(|a, b| a == b).count();
        check(row, distinct as f32 * value(rank, token), "combined")?;
    }
    let (node, local) = (topology.node_of(rank), topology.local_of(rank));
    Ok(format!(
        "rank {rank} (node {node}, local rank {local}): {rows} rows received, {TOKENS} tokens combined"
    ))
}

fn check(row: &[bf16], expected: f32, what: &str) -> Result<(), Failure> {
    match row.iter().find(|element| element.to_f32() != expected) {
        None => Ok(()),
        Some(other) => Err(format!("{what}: {other} where {expected} was expected").into()),
    }
}
