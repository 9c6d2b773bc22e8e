//! Options that the commands share.

use std::time::Duration;

use clap::ValueEnum;
use railhop::{ConfigBuilder, RowFormat, ScaleFormat};

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
    /// Threads that drive the roles of all ranks
    #[arg(long)]
    workers: Option<usize>,
    /// Deadline of every wait, in seconds
    #[arg(long)]
    deadline_s: Option<f64>,
}

impl Tuning {
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
        builder = set(builder, self.workers, ConfigBuilder::worker_budget);
        match self.deadline_s {
            Some(seconds) => builder.deadline(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO)),
            None => builder,
        }
    }
}
