//! What a world is made of, decided once: the builder refuses what can't make progress.

use std::time::Duration;

use crate::error::ConfigError;
use crate::interface::Interface;
use crate::topology::{ExpertPlacement, Topology};

/// The longest `topk` a slot header can carry.
pub const MAX_TOPK: usize = 32;

/// The most experts a world may have.
const MAX_EXPERTS: usize = 1 << 24;

/// The most bytes a region may have: what fits an address space of 47 bits.
const MAX_REGION: u128 = 1 << 46;

/// What runs the roles.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum EngineKind {
    /// Threads of the host.
    #[default]
    Host,
    /// Kernels on CUDA devices.
    Cuda(Cuda),
}

/// Stages of a warp in shared memory: how much is in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Staging {
    /// Bytes of a stage: a multiple of 256 (two bytes for each of a group's 128 elements).
    pub stage_bytes: usize,
    /// Number of stages, a power of two of at least 2.
    pub stages: usize,
}

/// How data goes between the devices of ranks of one process that are on different "nodes".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Rails {
    /// From device to device where they reach each other, else by way of the host.
    #[default]
    Any,
    /// By way of the host, as to a fabric that does not reach device memory.
    Staged,
}

/// How the kernels of a rank run. [`Budget`](crate::budget::Budget) derives it from a workload and a machine; the
/// default suits one H100 per rank.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cuda {
    /// Ordinals of the devices: of ranks in one process, rank i is on the one at i modulo their number; of ranks in
    /// processes of their own, the one with local rank i.
    pub devices: Vec<usize>,
    /// Blocks of a dispatch, and of a combine: the SM budget.
    pub blocks: usize,
    /// Warps of each, 1 to 16.
    pub warps: usize,
    /// Warps of a plan, which has one block.
    pub plan_warps: usize,
    /// Stages of a dispatching warp.
    pub dispatch: Staging,
    /// Stages of a combining warp, of [`SUM_BYTES`](crate::wire::device::SUM_BYTES) each.
    pub combine: Staging,
    /// Whether a dispatch and a combine of a rank may run at the same time. All blocks that may must fit the device
    /// together: without, twice as many do.
    pub overlap: bool,
    /// How rails between ranks of one process go.
    pub rails: Rails,
    /// Cores for the proxies, rank i on the one at i modulo their number; none: anywhere.
    pub proxy_cores: Vec<usize>,
}

impl Cuda {
    /// The ordinal of the device that is number `index` in turn; of the first there is, where none is named.
    pub(crate) fn device(&self, index: usize) -> usize {
        self.devices.get(index % self.devices.len().max(1)).copied().unwrap_or(0)
    }
}

impl Default for Cuda {
    fn default() -> Self {
        Self {
            devices: vec![0],
            blocks: 8,
            warps: 8,
            plan_warps: 16,
            dispatch: Staging { stage_bytes: 2048, stages: 8 },
            combine: Staging { stage_bytes: 1024, stages: 16 },
            overlap: true,
            rails: Rails::default(),
            proxy_cores: Vec::new(),
        }
    }
}

/// What carries hop 1 between processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Carrier {
    /// RDMA where every rank of the world has a device for it, else TCP.
    #[default]
    Any,
    /// TCP.
    Tcp,
    /// RDMA through verbs.
    Verbs,
}

/// How the rail peers of a world of processes reach each other. A rank's own: only the carrier must be the same on all.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Network {
    /// What carries hop 1.
    pub carrier: Carrier,
    /// Where others connect to this rank; by default the address from which it reaches the others.
    pub interface: Option<Interface>,
    /// TCP connections to each rail peer: the smaller number of the two ends counts.
    pub connections: usize,
    /// RDMA.
    pub verbs: Verbs,
}

/// How RDMA devices are used.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Verbs {
    /// Name of the device; by default the active one that is nearest to the rank's GPU, or else the rank's own by its
    /// index on the node.
    pub device: Option<String>,
    /// The device's port; by default the first active one.
    pub port: Option<u8>,
    /// Index in the table of GIDs; by default a RoCE v2 entry with an IPv4 address, or else the best there is.
    pub gid: Option<u8>,
    /// Queue pairs to each rail peer.
    pub queue_pairs: usize,
    /// How long a packet may stay unanswered, 4.096 µs × 2^timeout, 1 to 31.
    pub timeout: u8,
    /// How often it is sent again, 0 to 7; software RoCE takes 7 for "for ever".
    pub retries: u8,
    /// Service level (InfiniBand), and traffic class (RoCE).
    pub class: (u8, u8),
}

impl Network {
    /// [`ConfigBuilder::chunk_tokens`] and [`ConfigBuilder::ring_slots`] that do well where hop 1 crosses a network: a chunk
    /// costs system calls and wake-ups at both ends.
    pub const CHUNK_TOKENS: usize = 8;
    /// See [`Network::CHUNK_TOKENS`].
    pub const RING_SLOTS: usize = 32;
}

impl Default for Network {
    fn default() -> Self {
        Self { carrier: Carrier::Any, interface: None, connections: 2, verbs: Verbs::default() }
    }
}

impl Default for Verbs {
    fn default() -> Self {
        // A queue pair that is never heard of fails after 7 × 1.07 s, or a few times as much: devices may take longer.
        Self { device: None, port: None, gid: None, queue_pairs: 2, timeout: 18, retries: 6, class: (0, 0) }
    }
}

/// The settled configuration of a world. All ranks must hold an equal one; its hash is in every enter record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Config {
    pub(crate) name: String,
    pub(crate) members: Vec<u64>,
    pub(crate) topology: Topology,
    pub(crate) placement: ExpertPlacement,
    pub(crate) max_hidden: usize,
    pub(crate) max_topk: usize,
    pub(crate) max_tokens: usize,
    pub(crate) channels: usize,
    pub(crate) chunk_tokens: usize,
    pub(crate) ring_slots: usize,
    pub(crate) worker_budget: usize,
    pub(crate) pool_bytes: usize,
    pub(crate) deadline: Duration,
    pub(crate) first_index: u64,
    pub(crate) engine: EngineKind,
    pub(crate) network: Network,
    /// What all ranks of a world must agree on, as one number: of all of the above but what is a rank's own.
    agreement: u64,
}

impl Config {
    /// The deadline of every wait, if nothing else is said.
    pub const DEADLINE: Duration = Duration::from_secs(100);

    /// Starts from the defaults for `topology`; at least [`ConfigBuilder::experts`] must follow.
    pub fn builder(topology: Topology) -> ConfigBuilder {
        ConfigBuilder {
            config: Config {
                name: "world".into(),
                members: (0..topology.world_size() as u64).collect(),
                topology,
                placement: ExpertPlacement::contiguous(0, topology.world_size()),
                max_hidden: 8192,
                max_topk: 8,
                max_tokens: 8192,
                channels: 1,
                chunk_tokens: 4,
                ring_slots: 16,
                worker_budget: std::thread::available_parallelism().map_or(1, |n| n.get()),
                pool_bytes: 256 << 20,
                deadline: Self::DEADLINE,
                first_index: 0,
                engine: EngineKind::Host,
                network: Network::default(),
                agreement: 0,
            },
            num_experts: None,
            channels: None,
        }
    }

    /// Nodes and ranks.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// Which rank owns which expert.
    pub fn placement(&self) -> &ExpertPlacement {
        &self.placement
    }

    /// Name of the world.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The caller's names of the ranks, in rank order.
    pub fn members(&self) -> &[u64] {
        &self.members
    }

    /// Independent lanes, each with its own rings and its own contiguous share of the tokens.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Tokens published by one tail update.
    pub fn chunk_tokens(&self) -> usize {
        self.chunk_tokens
    }

    /// Slots of each ring.
    pub fn ring_slots(&self) -> usize {
        self.ring_slots
    }

    /// Host threads that drive the roles: the host engine's counterpart of an SM budget.
    pub fn worker_budget(&self) -> usize {
        self.worker_budget
    }

    /// What runs the roles.
    pub fn engine(&self) -> &EngineKind {
        &self.engine
    }

    /// How rail peers in other processes are reached.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The same world on another engine.
    pub fn on(self, engine: EngineKind) -> Self {
        Self { engine, ..self }
    }

    /// The one deadline of all waits.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// What all ranks of a world must agree on, as one number, the same in every build. Engine, network, worker budget and
    /// deadline are a rank's own.
    pub(crate) fn agreement(&self) -> u64 {
        self.agreement
    }

    /// What that number is about, for people.
    pub(crate) fn summary(&self) -> String {
        let (topology, experts) = (self.topology, self.placement.num_experts());
        format!(
            "{:?} ({} x {} ranks, {experts} experts, max_hidden {}, max_topk {}, max_tokens {}, {} channels, {} ring slots, \
             chunks of {}, hash {:016x})",
            self.name,
            topology.nodes(),
            topology.ranks_per_node(),
            self.max_hidden,
            self.max_topk,
            self.max_tokens,
            self.channels,
            self.ring_slots,
            self.chunk_tokens,
            self.agreement,
        )
    }

    fn hash_agreement(&self) -> u64 {
        let topology = self.topology;
        let sizes = [topology.nodes(), topology.ranks_per_node(), self.name.len(), self.members.len()];
        let most = [self.max_hidden, self.max_topk, self.max_tokens];
        let rings = [self.channels, self.chunk_tokens, self.ring_slots, self.placement.num_experts()];
        let sizes = sizes.into_iter().chain(most).chain(rings).map(|size| size as u64);
        let owners = (0..self.placement.num_experts()).map(|expert| self.placement.rank_of(expert) as u64);
        let numbers: Vec<u64> = sizes.chain(self.members.iter().copied()).chain(owners).collect();
        let mut hasher = blake3::Hasher::new();
        for number in numbers {
            hasher.update(&number.to_le_bytes());
        }
        hasher.update(self.name.as_bytes());
        let hash = hasher.finalize();
        u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("32 bytes"))
    }

    /// The contiguous range of a rank's `tokens` that `channel` owns.
    pub(crate) fn channel_range(&self, channel: usize, tokens: usize) -> std::ops::Range<usize> {
        tokens * channel / self.channels..tokens * (channel + 1) / self.channels
    }
}

/// Collects settings; [`ConfigBuilder::build`] checks them together.
#[derive(Debug, Clone)]
pub struct ConfigBuilder {
    config: Config,
    /// Experts to place contiguously, unless a placement was given.
    num_experts: Option<usize>,
    channels: Option<usize>,
}

impl ConfigBuilder {
    /// Number of experts, placed contiguously: the first `num_experts % world_size` ranks own one more.
    pub fn experts(mut self, num_experts: usize) -> Self {
        self.num_experts = Some(num_experts);
        self
    }

    /// An explicit expert placement.
    pub fn placement(mut self, placement: ExpertPlacement) -> Self {
        self.config.placement = placement;
        self.num_experts = None;
        self
    }

    /// Name of the world: several may coexist in a process.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.config.name = name.into();
        self
    }

    /// The caller's names (ranks of the whole job, say) of this world's members, in rank order.
    pub fn members(mut self, members: impl Into<Vec<u64>>) -> Self {
        self.config.members = members.into();
        self
    }

    /// The largest `hidden` (elements per row) any operation will use; sizes the rings.
    pub fn max_hidden(mut self, hidden: usize) -> Self {
        self.config.max_hidden = hidden;
        self
    }

    /// The largest `topk` any operation will use, at most [`MAX_TOPK`]; sizes the rings.
    pub fn max_topk(mut self, topk: usize) -> Self {
        self.config.max_topk = topk;
        self
    }

    /// The most tokens a rank may bring to one operation on a device, where it sizes plans: a rank must be able to
    /// forward what all its rail peers bring.
    pub fn max_tokens(mut self, tokens: usize) -> Self {
        self.config.max_tokens = tokens;
        self
    }

    /// Runs the roles as kernels on CUDA devices.
    pub fn cuda(mut self, cuda: Cuda) -> Self {
        self.config.engine = EngineKind::Cuda(cuda);
        self
    }

    /// How rail peers in other processes are reached.
    pub fn network(mut self, network: Network) -> Self {
        self.config.network = network;
        self
    }

    /// Number of channels: the host engine works on at most this many pieces of one rank at a time. By default as
    /// many as it takes for the ranks of an in-process world to occupy all workers.
    pub fn channels(mut self, channels: usize) -> Self {
        self.channels = Some(channels);
        self
    }

    /// Tokens published by one tail update.
    pub fn chunk_tokens(mut self, tokens: usize) -> Self {
        self.config.chunk_tokens = tokens;
        self
    }

    /// Slots of each ring: a power of two, at least one chunk.
    pub fn ring_slots(mut self, slots: usize) -> Self {
        self.config.ring_slots = slots;
        self
    }

    /// Host threads that drive the roles of all ranks of this process.
    pub fn worker_budget(mut self, threads: usize) -> Self {
        self.config.worker_budget = threads;
        self
    }

    /// Bytes of each rank's pool: receive buffers and expert outputs that peers touch come from it. Pages
    /// are taken from the system as they are first used.
    pub fn pool_bytes(mut self, bytes: usize) -> Self {
        self.config.pool_bytes = bytes;
        self
    }

    /// The deadline of every wait.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.config.deadline = deadline;
        self
    }

    /// Where all indices start. Tests set it near the 48-bit wrap.
    #[doc(hidden)]
    pub fn first_index(mut self, index: u64) -> Self {
        self.config.first_index = index;
        self
    }

    /// Checks everything together.
    ///
    /// # Errors
    /// A configuration that could not make progress, with the reason and the nearest value that works.
    pub fn build(mut self) -> Result<Config, ConfigError> {
        let world = self.config.topology.world_size();
        self.config.channels = self.channels.unwrap_or(self.config.worker_budget.div_ceil(world).max(1));
        let c = &self.config;
        let check = ConfigError::check;
        let experts = self.num_experts.unwrap_or(c.placement.num_experts());
        check(experts > 0, "experts", experts, "a world has at least one expert", Some(1))?;
        check(experts <= MAX_EXPERTS, "experts", experts, "at most 2^24 experts", Some(MAX_EXPERTS))?;
        let placed = c.placement.world_size();
        check(placed == world, "placement", placed, "made for another world size", Some(world))?;
        let members = c.members.len();
        check(members == world, "members", members, "as many members as ranks are needed", Some(world))?;
        let mut unique = c.members.clone();
        unique.sort_unstable();
        unique.dedup();
        check(unique.len() == world, "members", unique.len(), "members must differ", Some(world))?;
        check(c.max_hidden > 0, "max_hidden", c.max_hidden, "rows have at least 16 bytes", Some(8))?;
        check(
            c.max_hidden <= 1 << 24,
            "max_hidden",
            c.max_hidden,
            "rows have at most 2^24 elements",
            Some(1 << 24),
        )?;
        let topk_ok = (1..=MAX_TOPK).contains(&c.max_topk);
        check(
            topk_ok,
            "max_topk",
            c.max_topk,
            "1 to 32 entries per token",
            Some(c.max_topk.clamp(1, MAX_TOPK)),
        )?;
        let channels_ok = (1..=1024).contains(&c.channels);
        check(channels_ok, "channels", c.channels, "1 to 1024 channels", Some(c.channels.clamp(1, 1024)))?;
        check(c.chunk_tokens > 0, "chunk_tokens", 0, "an empty chunk publishes nothing", Some(1))?;
        check(
            c.chunk_tokens <= 1 << 20,
            "chunk_tokens",
            c.chunk_tokens,
            "at most 2^20 tokens",
            Some(1 << 20),
        )?;
        let slots = c.ring_slots.max(c.chunk_tokens).checked_next_power_of_two().unwrap_or(1 << 20);
        let (ring, reason) =
            (c.ring_slots, "the ring must hold a chunk, or its sender could never publish one");
        check(ring >= c.chunk_tokens, "ring_slots", ring, reason, Some(slots))?;
        check(
            ring.is_power_of_two(),
            "ring_slots",
            ring,
            "a ring has a power-of-two number of slots",
            Some(slots),
        )?;
        check(c.worker_budget > 0, "worker_budget", 0, "no thread would drive the roles", Some(1))?;
        check(!c.deadline.is_zero(), "deadline", 0, "every wait would expire at once", Some(1))?;
        // Slots hold BF16 rows of either lane, with a header; rings dominate what is not the pool.
        let slot = 2 * (2 * c.max_hidden + 16 * MAX_TOPK) as u128;
        let rings = slot * (c.channels * c.topology.nodes()) as u128 * ring as u128;
        check(
            rings <= MAX_REGION,
            "ring_slots",
            ring,
            "the rings would exceed 2^46 bytes",
            Some(slots.min(16)),
        )?;
        let pool_ok = c.pool_bytes as u128 <= MAX_REGION;
        check(
            pool_ok,
            "pool_bytes",
            c.pool_bytes,
            "the pool would exceed 2^46 bytes",
            Some(MAX_REGION as usize),
        )?;
        let network = &c.network;
        for (field, value, most) in [
            ("connections", network.connections, 64),
            ("queue_pairs", network.verbs.queue_pairs, 64),
            ("timeout", network.verbs.timeout.into(), 31),
        ] {
            let ok = (1..=most).contains(&value);
            check(ok, field, value, &format!("1 to {most}"), Some(value.clamp(1, most)))?;
        }
        let retries = usize::from(network.verbs.retries);
        check(retries <= 7, "retries", retries, "0 to 7", Some(7))?;
        if let Some(experts) = self.num_experts {
            self.config.placement = ExpertPlacement::contiguous(experts, world);
        }
        self.config.agreement = self.config.hash_agreement();
        Ok(self.config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(ConfigBuilder) -> ConfigBuilder) -> ConfigError {
        change(Config::builder(Topology::new(2, 2).unwrap()).experts(4)).build().unwrap_err()
    }

    #[test]
    fn what_cannot_make_progress_is_refused_with_what_would_work() {
        let ring = refused(|b| b.chunk_tokens(12).ring_slots(8));
        assert_eq!((ring.field, ring.nearest), ("ring_slots", Some(16)));
        assert_eq!(refused(|b| b.ring_slots(12)).nearest, Some(16));
        assert_eq!(refused(|b| b.chunk_tokens(0)).nearest, Some(1));
        assert_eq!(refused(|b| b.worker_budget(0)).field, "worker_budget");
        assert_eq!(refused(|b| b.max_topk(33)).nearest, Some(32));
        assert_eq!(refused(|b| b.channels(0)).field, "channels");
        assert_eq!(refused(|b| b.experts(0)).field, "experts");
        assert_eq!(refused(|b| b.experts(usize::MAX)).field, "experts");
        assert_eq!(refused(|b| b.ring_slots(1 << 62)).field, "ring_slots");
        assert_eq!(refused(|b| b.ring_slots(usize::MAX)).field, "ring_slots");
        assert_eq!(refused(|b| b.pool_bytes(usize::MAX)).field, "pool_bytes");
        assert_eq!(refused(|b| b.members([1, 1, 2, 3])).field, "members");
        assert_eq!(refused(|b| b.placement(ExpertPlacement::contiguous(4, 2))).field, "placement");
        assert!(refused(|b| b.deadline(Duration::ZERO)).to_string().contains("deadline"));
        let network = |network| refused(|b| b.network(network));
        assert_eq!(network(Network { connections: 0, ..Network::default() }).nearest, Some(1));
        let verbs = Verbs { timeout: 32, ..Verbs::default() };
        assert_eq!(network(Network { verbs, ..Network::default() }).nearest, Some(31));
    }

    #[test]
    fn what_ranks_agree_on_is_one_number_in_every_build() {
        let world = || Config::builder(Topology::new(2, 2).unwrap()).experts(8).channels(2);
        let hash = |builder: ConfigBuilder| builder.build().unwrap().agreement();
        assert_eq!(hash(world()), 14_339_765_971_522_255_702);
        let others = [
            world().name("other"),
            world().members([0, 1, 3, 2]),
            world().experts(9),
            world().placement(ExpertPlacement::table(&[0, 1, 2, 3, 3, 2, 1, 0], 4).unwrap()),
            world().max_hidden(4096),
            world().max_topk(4),
            world().max_tokens(4096),
            world().channels(3),
            world().ring_slots(32),
            world().chunk_tokens(2),
        ];
        let mut hashes: Vec<u64> = others.into_iter().map(hash).chain([hash(world())]).collect();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), 11, "every setting counts");
        let own = [
            world().deadline(Duration::from_secs(1)),
            world().worker_budget(7),
            world().cuda(Cuda::default()),
        ];
        assert!(own.into_iter().all(|builder| hash(builder) == hash(world())), "a rank's own settings don't");
    }

    #[test]
    fn channels_share_the_tokens() {
        let config = Config::builder(Topology::new(1, 1).unwrap()).experts(1).channels(3).build().unwrap();
        let ranges: Vec<_> = (0..3).map(|channel| config.channel_range(channel, 7)).collect();
        assert_eq!(ranges, [0..2, 2..4, 4..7]);
    }
}
