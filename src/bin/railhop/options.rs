//! Options that the commands share.

use std::time::Duration;

use clap::ValueEnum;
use railhop::budget::Overrides;
use railhop::wire::device::HandleMap;
use railhop::{
    Carrier, Config, ConfigBuilder, EngineKind, Interface, Network, RowFormat, RowShape, ScaleFormat, Verbs,
};

/// The format rows are dispatched in.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Format {
    /// Element type of dispatched rows
    #[arg(long, visible_alias = "format", value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Scales of FP8 rows
    #[arg(long, value_enum, default_value_t = Scales::F32)]
    scales: Scales,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    Bf16,
    Fp8,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Scales {
    F32,
    Ue8m0,
}

impl Format {
    /// The library's name for it.
    pub fn row_format(self) -> RowFormat {
        match (self.dtype, self.scales) {
            (Dtype::Bf16, _) => RowFormat::Bf16,
            (Dtype::Fp8, Scales::F32) => RowFormat::Fp8(ScaleFormat::F32),
            (Dtype::Fp8, Scales::Ue8m0) => RowFormat::Fp8(ScaleFormat::Ue8m0),
        }
    }
}

/// What runs the ranks.
#[derive(Debug, Clone, clap::Args)]
pub struct Engine {
    /// What runs the ranks: threads of the host, or kernels on CUDA devices
    #[arg(long, value_enum, default_value_t = EngineName::Host)]
    engine: EngineName,
    /// CUDA devices, by ordinal; ranks are spread over them round robin [default: 0]
    #[arg(long, value_name = "0,1,…", value_delimiter = ',')]
    devices: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EngineName {
    Host,
    Cuda,
}

impl Engine {
    /// The devices to run on; none for the host.
    pub fn cuda(&self) -> Option<Vec<usize>> {
        let devices = if self.devices.is_empty() { vec![0] } else { self.devices.clone() };
        (self.engine == EngineName::Cuda).then_some(devices)
    }

    /// The devices that were named.
    pub fn named(&self) -> &[usize] {
        &self.devices
    }

    /// Refuses devices that nothing would run on.
    pub fn require_cuda_for_devices(&self) -> Result<(), String> {
        match self.engine {
            EngineName::Host if !self.devices.is_empty() => {
                Err("--devices names CUDA devices: it needs --engine cuda".into())
            }
            _ => Ok(()),
        }
    }
}

/// What operations of `tokens` tokens a rank take from the pool beside their buffers: on devices a plan, and what is
/// copied there and back.
pub fn pool_for_operations(config: &Config, shape: RowShape, tokens: usize) -> usize {
    /// For whole lines of each block.
    const ROUNDING: usize = 1 << 12;
    if *config.engine() == EngineKind::Host {
        return 0;
    }
    let forwarded = tokens * (config.topology().nodes() - 1);
    let plan = HandleMap::new(config, tokens, shape.topk, forwarded).bytes;
    let routing = tokens * shape.topk * (size_of::<i64>() + size_of::<f32>());
    let rows = 2 * (2 * tokens * shape.hidden);
    plan + routing + rows + ROUNDING
}

/// What the configuration would otherwise choose.
#[derive(Debug, Clone, clap::Args)]
pub struct Tuning {
    /// Channels per rank
    #[arg(long)]
    channels: Option<usize>,
    /// Tokens published by one tail update
    #[arg(long)]
    chunk_tokens: Option<usize>,
    /// Slots per ring, a power of two
    #[arg(long)]
    ring_slots: Option<usize>,
    /// Threads that drive the roles of all ranks of a process [default: the cores, shared by the processes of a machine]
    #[arg(long)]
    workers: Option<usize>,
    /// Deadline of every wait, meetings of ranks included, in seconds [default: 100]
    #[arg(long, visible_alias = "deadline")]
    deadline_s: Option<f64>,
}

impl Tuning {
    /// The deadline of every wait.
    pub fn deadline(&self) -> Duration {
        let given = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO);
        self.deadline_s.map_or(Config::DEADLINE, given)
    }

    /// The part of it that a budget is derived around.
    pub fn overrides(&self) -> Overrides {
        let Self { channels, chunk_tokens, ring_slots, .. } = *self;
        Overrides { channels, chunk_tokens, ring_slots, ..Overrides::default() }
    }

    /// Overrides the builder's defaults by what was given.
    pub fn apply(&self, mut builder: ConfigBuilder) -> ConfigBuilder {
        let set = |builder: ConfigBuilder,
                   value: Option<usize>,
                   f: fn(ConfigBuilder, usize) -> ConfigBuilder| match value {
            Some(value) => f(builder, value),
            None => builder,
        };
        builder = set(builder, self.channels, ConfigBuilder::channels);
        builder = set(builder, self.chunk_tokens, ConfigBuilder::chunk_tokens);
        builder = set(builder, self.ring_slots, ConfigBuilder::ring_slots);
        set(builder, self.workers, ConfigBuilder::worker_budget).deadline(self.deadline())
    }
}

/// How the processes of a world reach each other.
#[derive(Debug, Clone, clap::Args)]
pub struct NetworkArgs {
    /// What carries hop 1 [default: RDMA where all ranks have it, else TCP]
    #[arg(long, value_enum, default_value_t = CarrierName::Any, hide_default_value = true)]
    carrier: CarrierName,
    /// Where others connect to: an address, a network (10.0.0.0/16) or a name (eth0) [default: RAILHOP_INTERFACE, else
    /// the address from which the store is reached]
    #[arg(long, value_name = "INTERFACE")]
    interface: Option<Interface>,
    /// TCP connections to each rail peer
    #[arg(long, default_value_t = Network::default().connections)]
    connections: usize,
    /// RDMA device, by name [default: the rank's own by its index on the node]
    #[arg(long, value_name = "NAME")]
    verbs_device: Option<String>,
    /// Port of the RDMA device [default: the first active one]
    #[arg(long, value_name = "PORT")]
    verbs_port: Option<u8>,
    /// Index in its table of GIDs [default: of a RoCE v2 entry with an IPv4 address, or else the best there is]
    #[arg(long, value_name = "INDEX")]
    verbs_gid: Option<u8>,
    /// Queue pairs to each rail peer
    #[arg(long, value_name = "N", default_value_t = Verbs::default().queue_pairs)]
    verbs_queue_pairs: usize,
    /// A packet may stay unanswered for 4.096 µs × 2^N
    #[arg(long, value_name = "N", default_value_t = Verbs::default().timeout)]
    verbs_timeout: u8,
    /// How often a packet is sent again
    #[arg(long, value_name = "N", default_value_t = Verbs::default().retries)]
    verbs_retries: u8,
    /// Service level, of InfiniBand
    #[arg(long, value_name = "LEVEL", default_value_t = Verbs::default().class.0)]
    verbs_service_level: u8,
    /// Traffic class, of RoCE
    #[arg(long, value_name = "CLASS", default_value_t = Verbs::default().class.1)]
    verbs_traffic_class: u8,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CarrierName {
    Any,
    Tcp,
    Verbs,
}

impl NetworkArgs {
    /// The library's form of it; `interface` is that of the environment.
    pub fn network(&self, interface: Option<Interface>) -> Network {
        Network {
            carrier: match self.carrier {
                CarrierName::Any => Carrier::Any,
                CarrierName::Tcp => Carrier::Tcp,
                CarrierName::Verbs => Carrier::Verbs,
            },
            interface: self.interface.clone().or(interface),
            connections: self.connections,
            verbs: Verbs {
                device: self.verbs_device.clone(),
                port: self.verbs_port,
                gid: self.verbs_gid,
                queue_pairs: self.verbs_queue_pairs,
                timeout: self.verbs_timeout,
                retries: self.verbs_retries,
                class: (self.verbs_service_level, self.verbs_traffic_class),
            },
        }
    }
}
