//! `railhop plan`: the budget of a world, with the reasons for it and what it costs.

use std::error::Error;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use railhop::budget::{Budget, Bytes, Choice, Hardware, Hop, Overrides, Phase, Seconds, Workload};
use railhop::wire::device::Staging;
use railhop::{RowShape, Topology};
use serde_json::{Value, json};

use crate::options::Format;

/// Columns that a table may take.
const WIDTH: u16 = 100;

/// The budget of a world.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// Nodes of the world
    #[arg(long)]
    nodes: usize,
    /// Ranks of each node
    #[arg(long)]
    ranks_per_node: usize,
    /// Tokens of each rank
    #[arg(long, default_value_t = 4096)]
    tokens: usize,
    /// Elements per row
    #[arg(long, default_value_t = 7168)]
    hidden: usize,
    /// Experts of the world, placed contiguously
    #[arg(long, default_value_t = 256)]
    experts: usize,
    /// Experts per token
    #[arg(long, default_value_t = 8)]
    topk: usize,
    #[command(flatten)]
    format: Format,
    /// The most nodes a token's experts lie on; by default routing is uniform
    #[arg(long)]
    node_limit: Option<usize>,
    /// Rows of the busiest rank over the mean; it sizes the pool
    #[arg(long)]
    skew: Option<f64>,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
    #[command(flatten)]
    given: Given,
}

/// The machine.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Machine")]
struct Machine {
    /// Bandwidth of hop 1 per rank, in 10^9 bytes/s [default: 50]
    #[arg(long)]
    hop1_gbs: Option<f64>,
    /// Bandwidth of hop 2 per rank, in 10^9 bytes/s [default: 160]
    #[arg(long)]
    hop2_gbs: Option<f64>,
    /// Latency of hop 1, proxy included, in microseconds [default: 5]
    #[arg(long)]
    hop1_latency_us: Option<f64>,
    /// Latency of hop 2 and of memory, in microseconds [default: 2]
    #[arg(long)]
    hop2_latency_us: Option<f64>,
    /// What one SM copies, in 10^9 bytes/s: an assumption until it is measured [default: 16]
    #[arg(long)]
    sm_gbs: Option<f64>,
    /// SMs of the device [default: 132]
    #[arg(long)]
    sms: Option<usize>,
    /// Shared memory that a block may have [default: 232448]
    #[arg(long)]
    shared_bytes: Option<usize>,
    /// What rings and send rings may take before channels are saved [default: 1073741824]
    #[arg(long)]
    ring_bytes: Option<usize>,
}

impl Machine {
    fn hardware(&self) -> Hardware {
        let usual = Hardware::default();
        Hardware {
            hop1_gbs: self.hop1_gbs.unwrap_or(usual.hop1_gbs),
            hop2_gbs: self.hop2_gbs.unwrap_or(usual.hop2_gbs),
            hop1_latency_us: self.hop1_latency_us.unwrap_or(usual.hop1_latency_us),
            hop2_latency_us: self.hop2_latency_us.unwrap_or(usual.hop2_latency_us),
            sm_gbs: self.sm_gbs.unwrap_or(usual.sm_gbs),
            sms: self.sms.unwrap_or(usual.sms),
            shared_bytes: self.shared_bytes.unwrap_or(usual.shared_bytes),
            ring_bytes: self.ring_bytes.unwrap_or(usual.ring_bytes),
        }
    }
}

/// What is not to be derived.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Given, where it is not to be derived")]
struct Given {
    /// SMs that the kernels take
    #[arg(long)]
    blocks: Option<usize>,
    /// Warps of a block
    #[arg(long)]
    warps: Option<usize>,
    /// Channels per rank
    #[arg(long)]
    channels: Option<usize>,
    /// Tokens published by one tail update
    #[arg(long)]
    chunk_tokens: Option<usize>,
    /// Slots per ring, a power of two
    #[arg(long)]
    ring_slots: Option<usize>,
    /// Stages of a warp of dispatch, a power of two
    #[arg(long)]
    dispatch_stages: Option<usize>,
    /// Stages of a warp of combine, a power of two
    #[arg(long)]
    combine_stages: Option<usize>,
    /// Bytes of the pool
    #[arg(long)]
    pool_bytes: Option<usize>,
}

impl Given {
    fn overrides(&self) -> Overrides {
        Overrides {
            blocks: self.blocks,
            warps: self.warps,
            channels: self.channels,
            chunk_tokens: self.chunk_tokens,
            ring_slots: self.ring_slots,
            dispatch_stages: self.dispatch_stages,
            combine_stages: self.combine_stages,
            pool_bytes: self.pool_bytes,
        }
    }
}

/// Prints the budget.
pub fn run(args: &PlanArgs) -> Result<(), Box<dyn Error + Send + Sync>> {
    let topology = Topology::new(args.nodes, args.ranks_per_node)?;
    let shape = RowShape { hidden: args.hidden, topk: args.topk, format: args.format.row_format() };
    let mut workload = Workload::new(topology, shape, args.experts, args.tokens);
    workload.node_limit = args.node_limit;
    workload.skew = args.skew.unwrap_or(workload.skew);
    let hardware = args.machine.hardware();
    let budget = Budget::new(&workload, &hardware, &args.given.overrides())?;
    match args.json {
        true => println!("{}", report(&budget, &hardware)),
        false => print_tables(&budget, &hardware),
    }
    Ok(())
}

fn report(budget: &Budget, hardware: &Hardware) -> Value {
    let Workload { topology, shape, experts, tokens, node_limit, skew } = budget.workload();
    let whole = |bytes: f64| bytes.round() as u64;
    let hop = |hop: &Hop| json!({ "bytes": whole(hop.bytes), "ms": hop.seconds * 1e3 });
    let phase = |phase: &Phase| {
        json!({
            "hop1": hop(&phase.hop1),
            "hop2": hop(&phase.hop2),
            "speed_of_light_ms": phase.light_seconds * 1e3,
            "copies": { "bytes": whole(phase.copied_bytes), "ms": phase.copy_seconds * 1e3, "gbs": phase.copy_gbs() },
            "least_ms": phase.least_seconds() * 1e3,
        })
    };
    let choice = |choice: &Choice| {
        let entry = json!({ "value": choice.value, "given": choice.given, "reason": choice.reason });
        (choice.name.to_string(), entry)
    };
    let (memory, targets) = (&budget.memory, &budget.targets);
    json!({
        "workload": {
            "nodes": topology.nodes(), "ranks_per_node": topology.ranks_per_node(), "tokens": tokens,
            "hidden": shape.hidden, "topk": shape.topk, "format": format!("{:?}", shape.format),
            "experts": experts, "node_limit": node_limit, "skew": skew,
        },
        "machine": {
            "hop1_gbs": hardware.hop1_gbs, "hop2_gbs": hardware.hop2_gbs,
            "hop1_latency_us": hardware.hop1_latency_us, "hop2_latency_us": hardware.hop2_latency_us,
            "sm_gbs": hardware.sm_gbs, "sms": hardware.sms, "shared_bytes": hardware.shared_bytes,
            "ring_bytes": hardware.ring_bytes,
        },
        "choices": budget.choices().iter().map(choice).collect::<serde_json::Map<_, _>>(),
        "targets_per_token": {
            "nodes": targets.nodes, "remote_nodes": targets.remote_nodes, "ranks": targets.ranks,
        },
        "bytes_in_flight": {
            "hop1": whole(hardware.hop1_in_flight()), "hop2": whole(hardware.hop2_in_flight()),
        },
        "dispatch": phase(&budget.dispatch),
        "combine": phase(&budget.combine),
        "memory": {
            "region": {
                "control": memory.region.control, "rings": memory.region.rings, "pool": memory.region.pool,
                "bytes": memory.region.region,
            },
            "private": { "send_rings": memory.send_rings, "bytes": memory.private },
            "mailbox": memory.mailbox,
            "handle": memory.handle,
            "handle_most": memory.handle_most,
            "tables": memory.tables,
        },
        "shared_memory": {
            "plan": memory.plan_shared, "dispatch": memory.dispatch_shared, "combine": memory.combine_shared,
        },
        "stage_bytes": {
            "dispatch": budget.dispatch_staging.stage_bytes, "combine": budget.combine_staging.stage_bytes,
        },
    })
}

fn print_tables(budget: &Budget, hardware: &Hardware) {
    let Workload { topology, shape, experts, tokens, node_limit, .. } = budget.workload();
    let routing =
        node_limit.map_or("uniform routing".into(), |limit| format!("at most {limit} nodes a token"));
    println!(
        "{}×{} ranks, each {tokens} tokens of {} elements, {:?}; {} of {experts} experts, {routing}",
        topology.nodes(),
        topology.ranks_per_node(),
        shape.hidden,
        shape.format,
        shape.topk,
    );
    let targets = &budget.targets;
    println!(
        "a token has {:.3} target ranks on {:.3} nodes, {:.3} of them remote",
        targets.ranks, targets.nodes, targets.remote_nodes,
    );
    println!("{}", choices(budget));
    println!("{}", phases(budget));
    println!(
        "in flight: {} on hop 1 ({} GB/s, {} µs), {} on hop 2 ({} GB/s, {} µs)",
        Bytes(hardware.hop1_in_flight()),
        hardware.hop1_gbs,
        hardware.hop1_latency_us,
        Bytes(hardware.hop2_in_flight()),
        hardware.hop2_gbs,
        hardware.hop2_latency_us,
    );
    println!("{}", memory(budget));
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(WIDTH).set_header(header);
    table
}

fn choices(budget: &Budget) -> Table {
    let mut table = table(&["choice", "value", "because"]);
    for choice in budget.choices() {
        table.add_row([choice.name.to_string(), choice.value.to_string(), choice.reason.clone()]);
    }
    align_right(&mut table, &[1]);
    table
}

fn phases(budget: &Budget) -> Table {
    let mut table =
        table(&["per rank", "hop 1", "time", "hop 2", "time", "speed of light", "copied by SMs", "time"]);
    for (name, phase) in [("dispatch", &budget.dispatch), ("combine", &budget.combine)] {
        table.add_row([
            name.to_string(),
            Bytes(phase.hop1.bytes).to_string(),
            Seconds(phase.hop1.seconds).to_string(),
            Bytes(phase.hop2.bytes).to_string(),
            Seconds(phase.hop2.seconds).to_string(),
            Seconds(phase.light_seconds).to_string(),
            Bytes(phase.copied_bytes).to_string(),
            Seconds(phase.copy_seconds).to_string(),
        ]);
    }
    align_right(&mut table, &[1, 2, 3, 4, 5, 6, 7]);
    table
}

fn memory(budget: &Budget) -> Table {
    let memory = &budget.memory;
    let mut table = table(&["memory per rank", "bytes", "what"]);
    let [warps, plan_warps] = [budget.warps, budget.plan_warps];
    let stages = |staging: &Staging| {
        format!("per block: {warps} warps, {} stages of {} bytes each", staging.stages, staging.stage_bytes)
    };
    let rows = [
        ("region", memory.region.region, "what peers map: control, rings, pool".into()),
        ("  control", memory.region.control, "index words and records".into()),
        ("  rings", memory.region.rings, "of both operations".into()),
        ("  pool", memory.region.pool, "receive buffers and experts' outputs".into()),
        ("private", memory.private, "send rings, state, gathered counts".into()),
        ("  send rings", memory.send_rings, "the mirror of the rings".into()),
        ("mailbox", memory.mailbox, "host-visible: commands, completions, reports".into()),
        ("handle", memory.handle, format!("each; at most {}", memory.handle_most)),
        ("tables", memory.tables, "experts, addresses of the node's regions".into()),
        ("plan, shared", memory.plan_shared, format!("its only block: {plan_warps} warps")),
        ("dispatch, shared", memory.dispatch_shared, stages(&budget.dispatch_staging)),
        ("combine, shared", memory.combine_shared, stages(&budget.combine_staging)),
    ];
    for (name, bytes, what) in rows {
        table.add_row([name.to_string(), bytes.to_string(), what]);
    }
    align_right(&mut table, &[1]);
    table
}

fn align_right(table: &mut Table, columns: &[usize]) {
    for &column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}
