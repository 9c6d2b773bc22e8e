//! The budget model: from a workload and a machine to blocks, warps, channels, chunks, rings and stages, each with its
//! reason, and to the bytes and the time that no choice can undercut.
//!
//! # The model
//!
//! A token's `topk` experts are distinct and uniformly random among the E experts of the world, which are placed
//! contiguously. A rank that owns e of them is missed with probability C(E − e, topk) / C(E, topk), and the same
//! holds for nodes; the expected numbers of distinct target ranks and nodes are sums over what is not missed. With a
//! node limit, a token first gets so many of the nodes with experts, uniformly at random, and then its experts among theirs. Everything is
//! averaged over the ranks of the world.
//!
//! Per rank and operation,
//! - hop 1 carries a slot per (token, remote target node), in dispatch with its header, in combine a BF16 row;
//! - hop 2 carries a row per (token, target rank), but for those that stay on the rank that forwards them: one of
//!   `ranks_per_node`, for a token meets its own local rank as often as any other;
//! - each hop takes its bytes over its bandwidth. The hops overlap, so an operation takes at least the longer of the
//!   two: its *speed of light*;
//! - SMs copy every row of either hop, and what stays on the rank. Both directions of a copy run at once, so what counts
//!   is the larger of the bytes read and the bytes written. The blocks are as many as do that in the time of light.
//!
//! ```
//! use railhop::budget::{Budget, Hardware, Overrides, Workload};
//! use railhop::{RowFormat, RowShape, ScaleFormat, Topology};
//!
//! let shape = RowShape { hidden: 7168, topk: 8, format: RowFormat::Fp8(ScaleFormat::F32) };
//! let workload = Workload::new(Topology::new(4, 8)?, shape, 256, 4096);
//! let budget = Budget::new(&workload, &Hardware::default(), &Overrides::default())?;
//! for choice in budget.choices() {
//!     println!("{} = {}: {}", choice.name, choice.value, choice.reason);
//! }
//! let config = budget.config_builder().name("experts").build()?;
//! assert_eq!(config.channels(), budget.channels);
//! # Ok::<(), railhop::error::ConfigError>(())
//! ```

mod choose;
mod targets;

use std::fmt;

use choose::Chooser;

use crate::config::{Config, ConfigBuilder, Cuda, MAX_TOPK};
use crate::error::ConfigError;
use crate::topology::Topology;
use crate::wire::command;
use crate::wire::device::{ExpertPlace, HandleMap, MailboxMap, PlanShared, PrivateMap, Staging, WarpMap};
use crate::wire::region::{LANES, Lane, Memory, RegionMap};
use crate::wire::shape::{RowFormat, RowShape};
use crate::wire::{ROW_ALIGN, align_up};

pub use targets::Targets;

/// The most warps a block may have: the launch bounds of the kernels.
pub const MAX_WARPS: usize = 16;

/// The most stages a warp may have: a lane initialises each barrier.
const MAX_STAGES: usize = 32;

/// What is to be moved.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// Nodes and ranks.
    pub topology: Topology,
    /// The rows of dispatch. Their tokens come as BF16; combine returns BF16.
    pub shape: RowShape,
    /// Experts of the world, placed contiguously.
    pub experts: usize,
    /// Tokens of each rank.
    pub tokens: usize,
    /// The most nodes a token's experts lie on, where routing is node-limited.
    pub node_limit: Option<usize>,
    /// Rows of the busiest rank over the mean. It sizes the pool; `railhop replay` measures it on recorded routing.
    pub skew: f64,
}

impl Workload {
    /// Uniform routing of `tokens` tokens a rank, and a skew of 1.25.
    pub fn new(topology: Topology, shape: RowShape, experts: usize, tokens: usize) -> Self {
        Self { topology, shape, experts, tokens, node_limit: None, skew: 1.25 }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let (shape, nodes) = (&self.shape, self.topology.nodes());
        let most = 1 << command::NODE.1;
        check(nodes <= most, "nodes", nodes, || "a command names its node with 12 bits".into(), Some(most))?;
        let multiple = shape.format.hidden_multiple();
        let aligned = align_up(shape.hidden.clamp(1, 1 << 24), multiple);
        let reason = || format!("rows of this format have a positive multiple of {multiple} elements");
        let is_aligned = shape.hidden > 0 && shape.hidden.is_multiple_of(multiple);
        check(is_aligned, "hidden", shape.hidden, reason, Some(aligned))?;
        let most = (1 << command::PITCH.1) * command::PITCH_UNIT / 2 - 16 * MAX_TOPK;
        let reason = || "a command names the bytes of a slot with 20 bits".into();
        check(shape.hidden <= most, "hidden", shape.hidden, reason, Some(most / ROW_ALIGN * ROW_ALIGN))?;
        let reason = || "1 to 32 entries per token".into();
        let is_topk = (1..=MAX_TOPK).contains(&shape.topk);
        check(is_topk, "topk", shape.topk, reason, Some(shape.topk.clamp(1, MAX_TOPK)))?;
        let reason = || format!("a token has {} distinct experts", shape.topk);
        check(self.experts >= shape.topk, "experts", self.experts, reason, Some(shape.topk))?;
        let most = u32::MAX as usize / self.topology.world_size();
        let reason = || "a rank receives 1 to 2^32 − 1 rows".into();
        let is_count = (1..=most).contains(&self.tokens);
        check(is_count, "tokens", self.tokens, reason, Some(self.tokens.clamp(1, most)))?;
        positive("skew", self.skew)?;
        let reason =
            || format!("the busiest rank has no fewer rows than the mean, and {} is less", self.skew);
        check(self.skew >= 1.0, "skew", self.skew as usize, reason, Some(1))?;
        let Some(limit) = self.node_limit else { return Ok(()) };
        let nearest = (1..=nodes).find(|&limit| self.fewest_experts(limit) >= shape.topk);
        let reason =
            || format!("a token's {} experts may not fit so many nodes of this placement", shape.topk);
        let fits = limit > 0 && self.fewest_experts(limit.min(nodes)) >= shape.topk;
        check(fits, "node_limit", limit, reason, nearest)
    }
}

/// What moves it. Bandwidths are of one rank and one direction, in 10^9 bytes a second.
#[derive(Debug, Clone, PartialEq)]
pub struct Hardware {
    /// Bandwidth of hop 1. Default 50, as in section 3.2.2 of the DeepSeek-V3 technical report.
    pub hop1_gbs: f64,
    /// Bandwidth of hop 2. Default 160, as there.
    pub hop2_gbs: f64,
    /// From a chunk that is complete in memory to its tail at the peer, proxy included, in microseconds. Default 5, an
    /// assumption.
    pub hop1_latency_us: f64,
    /// Of a load from the own memory or a peer's under load, in microseconds. Default 2, an assumption.
    pub hop2_latency_us: f64,
    /// What one SM copies, one way. Default 16, an assumption to be replaced by a measurement: the 20 SMs of that report
    /// would have to copy 50 + 160 + 160 GB/s (out, forwarded, received), 18.5 each, to occupy both hops.
    pub sm_gbs: f64,
    /// SMs of the device. Default 132.
    pub sms: usize,
    /// Dynamic shared memory that a block may have. Default 227 KiB.
    pub shared_bytes: usize,
    /// What rings and send rings of a rank may take together before channels are saved. Default 1 GiB.
    pub ring_bytes: usize,
}

impl Default for Hardware {
    fn default() -> Self {
        Self {
            hop1_gbs: 50.0,
            hop2_gbs: 160.0,
            hop1_latency_us: 5.0,
            hop2_latency_us: 2.0,
            sm_gbs: 16.0,
            sms: 132,
            shared_bytes: 227 << 10,
            ring_bytes: 1 << 30,
        }
    }
}

impl Hardware {
    fn check(&self) -> Result<(), ConfigError> {
        positive("hop1_gbs", self.hop1_gbs)?;
        positive("hop2_gbs", self.hop2_gbs)?;
        positive("hop1_latency_us", self.hop1_latency_us)?;
        positive("hop2_latency_us", self.hop2_latency_us)?;
        positive("sm_gbs", self.sm_gbs)?;
        check(self.sms > 0, "sms", self.sms, || "nothing would run".into(), Some(1))
    }

    /// Bytes that fill hop 1: bandwidth × latency.
    pub fn hop1_in_flight(&self) -> f64 {
        self.hop1_gbs * self.hop1_latency_us * 1e3
    }

    /// Bytes that fill hop 2.
    pub fn hop2_in_flight(&self) -> f64 {
        self.hop2_gbs * self.hop2_latency_us * 1e3
    }
}

/// What is not to be derived. The rest is derived around it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Blocks: SMs that the kernels of an operation take.
    pub blocks: Option<usize>,
    /// Warps of a block.
    pub warps: Option<usize>,
    /// Channels.
    pub channels: Option<usize>,
    /// Tokens published by one tail update.
    pub chunk_tokens: Option<usize>,
    /// Slots of each ring.
    pub ring_slots: Option<usize>,
    /// Stages of a warp of dispatch.
    pub dispatch_stages: Option<usize>,
    /// Stages of a warp of combine.
    pub combine_stages: Option<usize>,
    /// Bytes of the pool.
    pub pool_bytes: Option<usize>,
}

impl Overrides {
    fn check(&self, workload: &Workload, hardware: &Hardware) -> Result<(), ConfigError> {
        let between = |field, given: Option<usize>, most: usize, reason: &str| match given {
            Some(n) => check((1..=most).contains(&n), field, n, || reason.into(), Some(n.clamp(1, most))),
            None => Ok(()),
        };
        let reason = format!("a block takes an SM, and there are {}", hardware.sms);
        between("blocks", self.blocks, hardware.sms, &reason)?;
        between("warps", self.warps, MAX_WARPS, "the kernels are made for blocks of 1 to 16 warps")?;
        for (field, given) in
            [("dispatch_stages", self.dispatch_stages), ("combine_stages", self.combine_stages)]
        {
            let Some(n) = given else { continue };
            let nearest = n.clamp(2, MAX_STAGES).next_power_of_two();
            check(n == nearest, field, n, || "a power of two from 2 to 32".into(), Some(nearest))?;
        }
        // Channels, chunk and ring have their rules in the configuration, and each other as bounds.
        let chunk = self.chunk_tokens.unwrap_or(1);
        let builder = base_builder(workload).channels(self.channels.unwrap_or(1)).chunk_tokens(chunk);
        let slots = self.ring_slots.unwrap_or(chunk.clamp(1, 1 << 20).next_power_of_two());
        builder.ring_slots(slots).build().map(drop)
    }
}

fn base_builder(workload: &Workload) -> ConfigBuilder {
    let RowShape { hidden, topk, .. } = workload.shape;
    Config::builder(workload.topology).experts(workload.experts).max_hidden(hidden).max_topk(topk)
}

/// One chosen value and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Its name, as in [`Overrides`].
    pub name: &'static str,
    /// The value.
    pub value: usize,
    /// Whether it was given.
    pub given: bool,
    /// One sentence.
    pub reason: String,
}

/// What one hop carries for one rank in one operation, one way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hop {
    /// Expected bytes.
    pub bytes: f64,
    /// The time they take at the hop's bandwidth.
    pub seconds: f64,
}

/// One operation of one rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Phase {
    /// Along the rail.
    pub hop1: Hop,
    /// Inside the node.
    pub hop2: Hop,
    /// The speed of light: the longer of the two. 0 where nothing leaves the rank.
    pub light_seconds: f64,
    /// Bytes that SMs read, or write if that is more.
    pub copied_bytes: f64,
    /// The time in which the blocks are to copy them: the speed of light, or hop 2's where nothing leaves the rank.
    pub copy_target_seconds: f64,
    /// The time in which the chosen blocks copy them.
    pub copy_seconds: f64,
}

impl Phase {
    fn new(hardware: &Hardware, hops: [f64; 2], copied_bytes: f64) -> Self {
        let hop = |bytes: f64, gbs: f64| Hop { bytes, seconds: bytes / (gbs * 1e9) };
        let (hop1, hop2) = (hop(hops[0], hardware.hop1_gbs), hop(hops[1], hardware.hop2_gbs));
        let light_seconds = hop1.seconds.max(hop2.seconds);
        let alone = copied_bytes / (hardware.hop2_gbs * 1e9);
        let copy_target_seconds = if light_seconds > 0.0 { light_seconds } else { alone };
        Self { hop1, hop2, light_seconds, copied_bytes, copy_target_seconds, copy_seconds: 0.0 }
    }

    /// What the blocks must copy per second to keep up, in GB/s.
    pub fn copy_gbs(&self) -> f64 {
        self.copied_bytes / self.copy_target_seconds / 1e9
    }

    /// The least time with the chosen blocks: that of light, or of the copies.
    pub fn least_seconds(&self) -> f64 {
        self.light_seconds.max(self.copy_seconds)
    }
}

/// Exact bytes of one rank; of the first, which has no fewer experts than any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BudgetMemory {
    /// The region.
    pub region: Memory,
    /// Private memory, send rings included.
    pub private: usize,
    /// Send rings.
    pub send_rings: usize,
    /// The mailbox, in host-visible memory.
    pub mailbox: usize,
    /// A handle, for as many forwarded tokens as are expected.
    pub handle: usize,
    /// A handle, were every token of the rail to come.
    pub handle_most: usize,
    /// The table of experts and the addresses of the node's regions.
    pub tables: usize,
    /// Shared memory of a block of plan.
    pub plan_shared: usize,
    /// Shared memory of a block of dispatch.
    pub dispatch_shared: usize,
    /// Shared memory of a block of combine.
    pub combine_shared: usize,
}

/// Everything that the kernels of a world are launched with, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Budget {
    /// Blocks of dispatch and combine, one to an SM.
    pub blocks: usize,
    /// Warps of a block.
    pub warps: usize,
    /// Warps of plan's only block.
    pub plan_warps: usize,
    /// Channels.
    pub channels: usize,
    /// Tokens published by one tail update.
    pub chunk_tokens: usize,
    /// Slots of each ring.
    pub ring_slots: usize,
    /// Stages of a warp of dispatch.
    pub dispatch_staging: Staging,
    /// Stages of a warp of combine.
    pub combine_staging: Staging,
    /// Bytes of the pool.
    pub pool_bytes: usize,
    /// Where tokens go.
    pub targets: Targets,
    /// The dispatch of all tokens.
    pub dispatch: Phase,
    /// Their combine.
    pub combine: Phase,
    /// What all of it takes.
    pub memory: BudgetMemory,
    workload: Workload,
    choices: Vec<Choice>,
}

impl Budget {
    /// Chooses what `given` leaves open.
    ///
    /// # Errors
    /// The field that can't work, alone or with what else was given, and the nearest value that would.
    pub fn new(workload: &Workload, hardware: &Hardware, given: &Overrides) -> Result<Self, ConfigError> {
        workload.check()?;
        hardware.check()?;
        given.check(workload, hardware)?;
        let config = base_builder(workload).build()?;
        let targets = workload.targets();
        let mut chooser = Chooser { workload, hardware, given, config, targets, choices: Vec::new() };
        let mut phases = chooser.phases();
        let blocks = chooser.blocks(&phases);
        for phase in &mut phases {
            phase.copy_seconds = phase.copied_bytes / (blocks as f64 * hardware.sm_gbs * 1e9);
        }
        let [dispatch, combine] = phases;
        let chunk_tokens = chooser.chunk_tokens();
        let (warps, [dispatch_staging, combine_staging]) = chooser.warps(blocks, chunk_tokens)?;
        let plan_warps = chooser.plan_warps()?;
        let channels = chooser.channels(blocks * warps, plan_warps, chunk_tokens);
        let ring_slots = chooser.ring_slots(channels, chunk_tokens);
        let pool_bytes = chooser.pool_bytes();
        let choices = chooser.choices;
        let mut budget = Self {
            blocks,
            warps,
            plan_warps,
            channels,
            chunk_tokens,
            ring_slots,
            dispatch_staging,
            combine_staging,
            pool_bytes,
            targets,
            dispatch,
            combine,
            memory: BudgetMemory::default(),
            workload: workload.clone(),
            choices,
        };
        budget.memory = budget.memory_of(&budget.config_builder().build()?);
        Ok(budget)
    }

    /// Every choice with its reason.
    pub fn choices(&self) -> &[Choice] {
        &self.choices
    }

    /// What was to be moved.
    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    /// Sets what a configuration knows of the budget: channels, chunk, ring and pool.
    pub fn apply(&self, builder: ConfigBuilder) -> ConfigBuilder {
        let builder = builder.channels(self.channels).chunk_tokens(self.chunk_tokens);
        builder.ring_slots(self.ring_slots).pool_bytes(self.pool_bytes)
    }

    /// How the kernels run on `devices`, over which the ranks are spread round robin.
    pub fn cuda(&self, devices: Vec<usize>) -> Cuda {
        Cuda {
            devices,
            blocks: self.blocks,
            warps: self.warps,
            plan_warps: self.plan_warps,
            dispatch: self.dispatch_staging,
            combine: self.combine_staging,
            ..Cuda::default()
        }
    }

    /// Starts a configuration for the workload with this budget.
    pub fn config_builder(&self) -> ConfigBuilder {
        self.apply(base_builder(&self.workload))
    }

    /// The share of shared memory of each warp of `lane`, in worlds of `config`.
    pub fn warp_map(&self, config: &Config, lane: Lane) -> WarpMap {
        let staging = match lane {
            Lane::Dispatch => self.dispatch_staging,
            Lane::Combine => self.combine_staging,
        };
        WarpMap::new(config, lane, staging, &shape_of(&self.workload, lane))
    }

    fn memory_of(&self, config: &Config) -> BudgetMemory {
        let (topology, tokens) = (config.topology(), self.workload.tokens);
        let region = RegionMap::new(config);
        let handle = |forwarded| HandleMap::new(config, tokens, self.workload.shape.topk, forwarded).bytes;
        let [dispatch_shared, combine_shared] =
            LANES.map(|lane| self.warps * self.warp_map(config, lane).bytes as usize);
        BudgetMemory {
            region: region.memory,
            private: PrivateMap::new(config, &region).bytes,
            send_rings: region.memory.rings,
            mailbox: MailboxMap::new(config, 0).bytes,
            handle: handle((tokens as f64 * self.targets.remote_nodes).ceil() as usize),
            handle_most: handle(tokens * (topology.nodes() - 1)),
            tables: size_of::<ExpertPlace>() * self.workload.experts + 8 * topology.ranks_per_node(),
            plan_shared: PlanShared::bytes(config, self.plan_warps),
            dispatch_shared,
            combine_shared,
        }
    }
}

impl Default for BudgetMemory {
    fn default() -> Self {
        let region = Memory { control: 0, rings: 0, pool: 0, region: 0 };
        Self {
            region,
            private: 0,
            send_rings: 0,
            mailbox: 0,
            handle: 0,
            handle_most: 0,
            tables: 0,
            plan_shared: 0,
            dispatch_shared: 0,
            combine_shared: 0,
        }
    }
}

/// The rows that move on `lane`.
fn shape_of(workload: &Workload, lane: Lane) -> RowShape {
    match lane {
        Lane::Dispatch => workload.shape,
        Lane::Combine => RowShape { format: RowFormat::Bf16, ..workload.shape },
    }
}

fn refuse(field: &'static str, value: usize, reason: String, nearest: Option<usize>) -> ConfigError {
    ConfigError { field, value: value as u64, reason, nearest: nearest.map(|n| n as u64) }
}

fn check(
    ok: bool,
    field: &'static str,
    value: usize,
    reason: impl FnOnce() -> String,
    nearest: Option<usize>,
) -> Result<(), ConfigError> {
    if ok { Ok(()) } else { Err(refuse(field, value, reason(), nearest)) }
}

fn positive(field: &'static str, value: f64) -> Result<(), ConfigError> {
    let ok = value.is_finite() && value > 0.0;
    check(ok, field, value as usize, || format!("{value} is not a positive number"), None)
}

/// Bytes for people, in powers of ten.
#[derive(Debug, Clone, Copy)]
pub struct Bytes(pub f64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            b if b < 1e3 => write!(f, "{b:.0} B"),
            b if b < 1e6 => write!(f, "{:.1} kB", b / 1e3),
            b if b < 1e9 => write!(f, "{:.1} MB", b / 1e6),
            b => write!(f, "{:.2} GB", b / 1e9),
        }
    }
}

/// Seconds for people.
#[derive(Debug, Clone, Copy)]
pub struct Seconds(pub f64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            s if s < 1e-3 => write!(f, "{:.1} µs", s * 1e6),
            s if s < 1.0 => write!(f, "{:.3} ms", s * 1e3),
            s => write!(f, "{s:.3} s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::ScaleFormat;

    const WORLDS: [[usize; 2]; 8] = [[1, 1], [1, 8], [2, 1], [3, 5], [4, 8], [8, 8], [64, 8], [4, 64]];
    const FP8: RowFormat = RowFormat::Fp8(ScaleFormat::F32);

    fn workload([nodes, ranks]: [usize; 2], tokens: usize) -> Workload {
        let shape = RowShape { hidden: 7168, topk: 8, format: FP8 };
        Workload::new(Topology::new(nodes, ranks).unwrap(), shape, 256, tokens)
    }

    fn budget(workload: &Workload, given: &Overrides) -> Budget {
        Budget::new(workload, &Hardware::default(), given).unwrap()
    }

    /// What must hold of every budget.
    fn check_budget(budget: &Budget, hardware: &Hardware) {
        let workload = budget.workload();
        let config = budget.config_builder().build().unwrap();
        assert_eq!(config.channels(), budget.channels);
        assert_eq!(config.chunk_tokens(), budget.chunk_tokens);
        assert_eq!(config.ring_slots(), budget.ring_slots);
        let cuda = budget.cuda(vec![1, 3]);
        assert_eq!(cuda.devices, [1, 3]);
        assert_eq!(
            (cuda.blocks, cuda.warps, cuda.plan_warps),
            (budget.blocks, budget.warps, budget.plan_warps)
        );
        assert_eq!((cuda.dispatch, cuda.combine), (budget.dispatch_staging, budget.combine_staging));
        assert!((1..=hardware.sms).contains(&budget.blocks) && (1..=MAX_WARPS).contains(&budget.warps));
        let (region, memory) = (RegionMap::new(&config), &budget.memory);
        assert_eq!(memory.region, config.memory());
        assert_eq!(memory.region.pool, budget.pool_bytes);
        let private = PrivateMap::new(&config, &region);
        assert_eq!((memory.private, memory.private - memory.send_rings), (private.bytes, private.send_rings));
        assert_eq!(memory.mailbox, MailboxMap::new(&config, 0).bytes);
        let most = workload.tokens * (workload.topology.nodes() - 1);
        let handle = HandleMap::new(&config, workload.tokens, workload.shape.topk, most).bytes;
        assert!(memory.handle_most == handle && memory.handle <= handle);
        assert_eq!(memory.plan_shared, PlanShared::bytes(&config, budget.plan_warps));
        for (lane, bytes, staging) in [
            (Lane::Dispatch, memory.dispatch_shared, budget.dispatch_staging),
            (Lane::Combine, memory.combine_shared, budget.combine_staging),
        ] {
            let map = WarpMap::new(&config, lane, staging, &shape_of(workload, lane));
            assert_eq!(bytes, budget.warps * map.bytes as usize);
            assert!(bytes <= hardware.shared_bytes && staging.stages.is_power_of_two());
        }
        assert!(memory.plan_shared <= hardware.shared_bytes);
        for choice in budget.choices() {
            assert!(!choice.reason.is_empty() && !choice.reason.contains("NaN"), "{choice:?}");
        }
    }

    #[test]
    fn every_world_has_a_budget() {
        let hardware = Hardware::default();
        for world in WORLDS {
            for (tokens, hidden, topk) in
                [(4096, 7168, 8), (128, 7168, 8), (1, 16, 1), (100_000, 128, 32), (50, 65536, 3)]
            {
                for format in [RowFormat::Bf16, FP8, RowFormat::Fp8(ScaleFormat::Ue8m0)] {
                    let mut workload = workload(world, tokens);
                    workload.shape = RowShape { hidden, topk, format };
                    check_budget(&budget(&workload, &Overrides::default()), &hardware);
                }
            }
        }
    }

    #[test]
    fn the_budget_of_the_usual_world() {
        let workload = workload([4, 8], 4096);
        let budget = budget(&workload, &Overrides::default());
        assert_eq!((budget.blocks, budget.warps, budget.chunk_tokens), (12, 8, 8));
        assert_eq!((budget.channels, budget.ring_slots, budget.plan_warps), (42, 16, 16));
        let slot = slot_bytes(&workload);
        let hop1 = 4096.0 * budget.targets.remote_nodes * slot;
        assert!((budget.dispatch.hop1.bytes - hop1).abs() < 1.0);
        assert_eq!(budget.dispatch.light_seconds, hop1 / 50e9);
        assert!(budget.dispatch.copy_seconds <= budget.dispatch.light_seconds);
        assert!(budget.combine.copy_seconds <= budget.combine.light_seconds);
        assert_eq!(budget.combine.least_seconds(), budget.combine.light_seconds);
        let hardware = Hardware::default();
        assert_eq!((hardware.hop1_in_flight(), hardware.hop2_in_flight()), (250e3, 320e3));
    }

    /// A slot's header, codes and scales.
    fn slot_bytes(workload: &Workload) -> f64 {
        (112 + workload.shape.hidden + 4 * workload.shape.hidden / 128) as f64
    }

    #[test]
    fn hops_of_a_single_node_and_of_single_ranks() {
        let node = budget(&workload([1, 8], 4096), &Overrides::default());
        assert_eq!((node.dispatch.hop1.bytes, node.memory.region.rings), (0.0, 0));
        assert_eq!(node.dispatch.light_seconds, node.dispatch.hop2.seconds);
        let row = (7168 + 224 + 64 + 8) as f64;
        let hop2 = 4096.0 * node.targets.ranks * 7.0 / 8.0 * row;
        assert!((node.dispatch.hop2.bytes - hop2).abs() < 1.0);
        let rail = budget(&workload([2, 1], 4096), &Overrides::default());
        assert_eq!(rail.combine.hop2.bytes, 0.0);
        assert!(rail.combine.light_seconds > 0.0);
        let alone = budget(&workload([1, 1], 4096), &Overrides::default());
        assert_eq!(alone.combine.light_seconds, 0.0);
        assert!(alone.combine.copy_target_seconds > 0.0 && alone.combine.least_seconds() > 0.0);
    }

    #[test]
    fn rings_hold_what_is_in_flight() {
        let slow = Hardware { hop1_latency_us: 100.0, ..Hardware::default() };
        for world in [[2, 8], [4, 8], [8, 8]] {
            let workload = workload(world, 4096);
            let budget = Budget::new(&workload, &slow, &Overrides::default()).unwrap();
            check_budget(&budget, &slow);
            let rings = budget.channels * (world[0] - 1);
            let held = (rings * (budget.ring_slots - budget.chunk_tokens)) as f64 * slot_bytes(&workload);
            assert!(held >= 2.0 * slow.hop1_in_flight());
        }
    }

    #[test]
    fn rings_that_would_be_too_large_save_channels() {
        let few = Hardware { ring_bytes: 100 << 20, ..Hardware::default() };
        let workload = workload([8, 8], 4096);
        let budget = Budget::new(&workload, &few, &Overrides::default()).unwrap();
        assert!(budget.memory.region.rings + budget.memory.send_rings <= few.ring_bytes);
        let given = Overrides { channels: Some(64), ..Overrides::default() };
        assert_eq!(Budget::new(&workload, &few, &given).unwrap().channels, 64);
    }

    #[test]
    fn what_is_given_stays_and_the_rest_follows() {
        let workload = workload([4, 8], 4096);
        let free = budget(&workload, &Overrides::default());
        let all = Overrides {
            blocks: Some(20),
            warps: Some(6),
            channels: Some(11),
            chunk_tokens: Some(5),
            ring_slots: Some(64),
            dispatch_stages: Some(2),
            combine_stages: Some(8),
            pool_bytes: Some(1000),
        };
        let given = budget(&workload, &all);
        check_budget(&given, &Hardware::default());
        assert_eq!((given.blocks, given.warps, given.channels), (20, 6, 11));
        assert_eq!((given.chunk_tokens, given.ring_slots, given.pool_bytes), (5, 64, 1000));
        assert_eq!((given.dispatch_staging.stages, given.combine_staging.stages), (2, 8));
        for choice in given.choices() {
            assert_eq!(choice.given, choice.name != "plan_warps");
            let before = free.choices().iter().find(|free| free.name == choice.name).unwrap();
            assert!(!before.given && (!choice.given || choice.reason.starts_with("as given; otherwise")));
        }
        let with = |change: fn(&mut Overrides)| {
            let mut given = Overrides::default();
            change(&mut given);
            let budget = budget(&workload, &given);
            check_budget(&budget, &Hardware::default());
            budget
        };
        let wide = with(|given| given.blocks = Some(24));
        assert!(wide.channels > free.channels && wide.dispatch.copy_seconds < free.dispatch.copy_seconds);
        let narrow = with(|given| given.blocks = Some(4));
        assert!(
            narrow.channels < free.channels && narrow.combine.least_seconds() > free.combine.light_seconds
        );
        assert_eq!(with(|given| given.ring_slots = Some(4)).chunk_tokens, 4);
        assert_eq!(with(|given| given.chunk_tokens = Some(32)).ring_slots, 64);
        assert!(with(|given| given.channels = Some(1)).ring_slots > free.ring_slots);
        assert!(with(|given| given.warps = Some(16)).dispatch_staging.stage_bytes < 6912);
        assert!(with(|given| given.warps = Some(1)).blocks > 1);
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_would() {
        let usual = || (workload([4, 8], 4096), Hardware::default(), Overrides::default());
        type Change = fn(&mut Workload, &mut Hardware, &mut Overrides);
        let cases: [(Change, &str, Option<u64>); 24] = [
            (|w, _, _| w.shape.hidden = 7176, "hidden", Some(7184)),
            (|w, _, _| w.shape.hidden = 0, "hidden", Some(16)),
            (|w, _, _| w.shape.hidden = 1 << 24, "hidden", Some((1 << 23) - 512)),
            (|w, _, _| w.shape.topk = 33, "topk", Some(32)),
            (|w, _, _| w.experts = 7, "experts", Some(8)),
            (|w, _, _| w.tokens = 0, "tokens", Some(1)),
            (|w, _, _| w.skew = 0.5, "skew", Some(1)),
            (|w, _, _| w.node_limit = Some(0), "node_limit", Some(1)),
            (|w, _, _| (w.experts, w.node_limit) = (31, Some(1)), "node_limit", Some(2)),
            (|w, _, _| w.topology = Topology::new(4097, 1).unwrap(), "nodes", Some(4096)),
            (|_, h, _| h.hop1_gbs = 0.0, "hop1_gbs", None),
            (|_, h, _| h.sm_gbs = f64::NAN, "sm_gbs", None),
            (|_, h, _| h.hop2_latency_us = f64::INFINITY, "hop2_latency_us", None),
            (|_, h, _| h.sms = 0, "sms", Some(1)),
            (|_, h, _| h.shared_bytes = 1000, "shared_bytes", Some(4480)),
            (|_, _, o| o.blocks = Some(133), "blocks", Some(132)),
            (|_, _, o| o.warps = Some(17), "warps", Some(16)),
            (|_, h, o| (h.shared_bytes, o.warps) = (30_000, Some(16)), "warps", Some(4)),
            (|_, _, o| (o.blocks, o.warps) = (Some(1), Some(1)), "warps", Some(2)),
            (|_, _, o| o.channels = Some(0), "channels", Some(1)),
            (|_, _, o| (o.chunk_tokens, o.ring_slots) = (Some(12), Some(8)), "ring_slots", Some(16)),
            (|_, _, o| o.ring_slots = Some(12), "ring_slots", Some(16)),
            (|_, _, o| o.dispatch_stages = Some(3), "dispatch_stages", Some(4)),
            (|_, _, o| o.combine_stages = Some(64), "combine_stages", Some(32)),
        ];
        for (change, field, nearest) in cases {
            let (mut workload, mut hardware, mut given) = usual();
            change(&mut workload, &mut hardware, &mut given);
            let error = Budget::new(&workload, &hardware, &given).unwrap_err();
            assert_eq!((error.field, error.nearest), (field, nearest), "{error}");
        }
    }

    #[test]
    fn extreme_machines_have_a_budget_or_an_error() {
        let workload = workload([4, 8], 4096);
        for value in [1e-300, 1e-9, 1.0, 1e9, 1e300] {
            for change in [
                (|h, v| h.hop1_gbs = v) as fn(&mut Hardware, f64),
                |h, v| h.hop2_gbs = v,
                |h, v| h.hop1_latency_us = v,
                |h, v| h.hop2_latency_us = v,
                |h, v| h.sm_gbs = v,
            ] {
                let mut hardware = Hardware::default();
                change(&mut hardware, value);
                if let Ok(budget) = Budget::new(&workload, &hardware, &Overrides::default()) {
                    check_budget(&budget, &hardware);
                }
            }
        }
    }

    #[test]
    fn the_kernels_are_launched_with_as_many_warps() {
        let bounds = format!("__launch_bounds__({}, 1)", 32 * MAX_WARPS);
        assert!(include_str!("../kernels/ptx.cuh").contains(&bounds));
    }
}
