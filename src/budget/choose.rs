//! The choices, one after another: each is derived around those before it and around what was given.

use super::{
    Bytes, Choice, Hardware, MAX_WARPS, Overrides, Phase, Seconds, Targets, Workload, refuse, shape_of,
};
use crate::config::Config;
use crate::error::ConfigError;
use crate::wire::device::{PlanShared, STEP_TOKENS, SUM_BYTES, Staging, WarpMap};
use crate::wire::region::{LANES, Lane};
use crate::wire::shape::{CombineSlot, DispatchSlot, RecvLayout, max_pitches};
use crate::wire::{ROW_ALIGN, align_up};

/// Bytes a chunk's command should carry.
const COMMAND_BYTES: usize = 32 << 10;

/// How often a step waits for memory while none of its copies is under way: for index words, for headers, for the
/// first stage to fill, for the last to drain. An assumption.
const STEP_WAITS: f64 = 4.0;

/// How many times the warps that copying takes a block gets, for a warp also waits for credit, tails and completions.
/// An assumption.
const SPARE_WARPS: f64 = 2.0;

/// Stages of a warp of dispatch: one is written while the others are loaded.
const DISPATCH_STAGES: usize = 4;

/// The least bytes of a stage of dispatch: the unit of its size.
const LEAST_STAGE: usize = 256;

/// Sizes a block may have.
const WARPS: [usize; 5] = [1, 2, 4, 8, MAX_WARPS];

/// Makes the choices.
pub(super) struct Chooser<'a> {
    pub workload: &'a Workload,
    pub hardware: &'a Hardware,
    pub given: &'a Overrides,
    /// Of the workload, with defaults for what is chosen here.
    pub config: Config,
    pub targets: Targets,
    pub choices: Vec<Choice>,
}

impl Chooser<'_> {
    /// Settles `name`.
    fn settle(&mut self, name: &'static str, given: Option<usize>, derived: usize, reason: String) -> usize {
        let value = given.unwrap_or(derived);
        let reason = match given {
            Some(_) => format!("as given; otherwise {derived}: {reason}"),
            None => reason,
        };
        self.choices.push(Choice { name, value, given: given.is_some(), reason });
        value
    }

    fn peers(&self) -> usize {
        self.workload.topology.nodes() - 1
    }

    /// Bytes of a BF16 row: as tokens come, and as they return.
    fn bf16_row(&self) -> usize {
        2 * self.workload.shape.hidden
    }

    /// Bytes from slot to slot, in dispatch and in combine.
    fn pitches(&self) -> [usize; 2] {
        let shape = &self.workload.shape;
        [DispatchSlot::new(shape).pitch, CombineSlot::new(shape.hidden, 0).pitch]
    }

    /// The smaller pitch: a setting that both operations share must do for it.
    fn pitch(&self) -> usize {
        let [dispatch, combine] = self.pitches();
        dispatch.min(combine)
    }

    /// What dispatch and combine move.
    pub fn phases(&self) -> [Phase; 2] {
        let Targets { nodes, remote_nodes, ranks } = self.targets;
        let shape = &self.workload.shape;
        let (tokens, bf16) = (self.workload.tokens as f64, self.bf16_row() as f64);
        let [slot, partial] = self.pitches().map(|pitch| remote_nodes * pitch as f64);
        // Beside its elements and scales a row has local experts, weights, and its source.
        let row = (shape.row_bytes() + shape.scale_pitch() + 8 * shape.topk + 8) as f64;
        let per_node = self.workload.topology.ranks_per_node() as f64;
        let travelling = ranks * (per_node - 1.0) / per_node;
        // The sender reads a token at most once; the forwarder reads what came along the rail and the own node's tokens.
        let read = (remote_nodes.min(1.0) + nodes - remote_nodes) * bf16 + slot;
        let dispatched = read.max(slot + ranks * row);
        let combined = (ranks * bf16 + partial).max(partial + bf16);
        let phase =
            |hop1, hop2, copied| Phase::new(self.hardware, [tokens * hop1, tokens * hop2], tokens * copied);
        [phase(slot, travelling * row, dispatched), phase(partial, travelling * bf16, combined)]
    }

    /// As many as copy at the speed of light.
    pub fn blocks(&mut self, [dispatch, combine]: &[Phase; 2]) -> usize {
        let (name, phase) = match combine.copy_gbs() > dispatch.copy_gbs() {
            true => ("combine", combine),
            false => ("dispatch", dispatch),
        };
        let (gbs, each, sms) = (phase.copy_gbs(), self.hardware.sm_gbs, self.hardware.sms);
        let needed = gbs / each;
        let limit = match needed > sms as f64 {
            true => format!(", more than the {sms} there are"),
            false => String::new(),
        };
        let reason = format!(
            "{name} is to copy {} in {}, {gbs:.0} GB/s, which takes {needed:.2} SMs of {each} GB/s{limit}",
            Bytes(phase.copied_bytes),
            Seconds(phase.copy_target_seconds),
        );
        // Where tokens travel, two roles need a warp each.
        let least = if self.peers() > 0 && self.given.warps == Some(1) { 2.min(sms) } else { 1 };
        let derived = ((needed * (1.0 - 1e-9)).ceil() as usize).clamp(least, sms);
        self.settle("blocks", self.given.blocks, derived, reason)
    }

    /// As many as make a command worth posting.
    pub fn chunk_tokens(&mut self) -> usize {
        let pitch = self.pitch();
        let wanted = COMMAND_BYTES.div_ceil(pitch).next_power_of_two();
        let tokens = self.workload.tokens.next_power_of_two();
        let ring = self.given.ring_slots.unwrap_or(usize::MAX);
        let derived = wanted.min(STEP_TOKENS).min(tokens).min(ring);
        let limit = match derived {
            _ if derived == wanted => "enough (32 KiB) for a command to be worth posting",
            _ if derived == STEP_TOKENS => "as much as a step moves",
            _ if derived == tokens => "all that a rank has",
            _ => "as much as the given ring holds",
        };
        let bytes = (derived * pitch) as f64;
        let rate = match self.peers() {
            0 => String::new(),
            _ => format!(
                "; at full rate a rank posts one every {}",
                Seconds(bytes / self.hardware.hop1_gbs / 1e9)
            ),
        };
        let step = match self.given.chunk_tokens {
            Some(given) if given > STEP_TOKENS => {
                format!("; a step moves at most {STEP_TOKENS} tokens anyway")
            }
            _ => String::new(),
        };
        let reason = format!("{derived} slots of {pitch} bytes are {}, {limit}{rate}{step}", Bytes(bytes));
        self.settle("chunk_tokens", self.given.chunk_tokens, derived, reason)
    }

    /// As many as copy what the SM can, in the time in which they don't wait; and their stages.
    pub fn warps(&mut self, blocks: usize, chunk: usize) -> Result<(usize, [Staging; 2]), ConfigError> {
        let shared = self.hardware.shared_bytes;
        let staging = Stager::new(self, blocks, chunk);
        let fitting: Vec<usize> = WARPS.into_iter().filter(|&w| staging.stagings(w).is_some()).collect();
        let Some(&most) = fitting.last() else {
            let reason = "not even one warp has room for its stages".into();
            return Err(refuse("shared_bytes", shared, reason, Some(staging.least_bytes())));
        };
        // Where tokens travel, two roles need a warp each.
        let least = if blocks == 1 && self.peers() > 0 { 2 } else { 1 };
        let found = fitting.into_iter().find(|&warps| warps >= least && staging.is_enough(warps));
        let derived = found.unwrap_or(most);
        let warps = self.given.warps.unwrap_or(derived);
        if warps < least {
            let reason = "two roles need a warp each".into();
            return Err(refuse("warps", warps, reason, (most >= least).then_some(least)));
        }
        let Some(chosen) = staging.stagings(warps) else {
            let reason = format!("their stages have no room in {shared} bytes of shared memory");
            return Err(refuse("warps", warps, reason, Some(most)));
        };
        let ([dispatch, combine], [dispatch_step, combine_step]) =
            (staging.in_flight(derived), staging.steps);
        let reason = match found {
            Some(_) => format!(
                "each needs {} in dispatch and {} in combine under way to copy its part of {} GB/s in {:.0}% of its \
                 time, and its stages hold that",
                Bytes(dispatch),
                Bytes(combine),
                self.hardware.sm_gbs,
                100.0 / SPARE_WARPS,
            ),
            None => format!(
                "as many as a block can have, for steps of {} in dispatch and {} in combine are short beside {} of \
                 latency",
                Bytes(dispatch_step),
                Bytes(combine_step),
                Seconds(self.hardware.hop2_latency_us * 1e-6),
            ),
        };
        let stages = staging.derived_stages(warps);
        let needed = staging.in_flight(warps)[1];
        self.settle("warps", self.given.warps, derived, reason);
        let bytes = chosen[0].stage_bytes;
        let size = match bytes < staging.row() {
            true => {
                format!("with {bytes} bytes each they fill a warp's part of {shared} bytes of shared memory")
            }
            false => format!("with {bytes} bytes each holds a BF16 row"),
        };
        let reason = format!("one is written while the others load; {size}");
        self.settle("dispatch_stages", self.given.dispatch_stages, stages[0], reason);
        let reason = match needed.is_finite() {
            true => {
                format!("pieces of {SUM_BYTES} bytes for the {} that a warp has under way", Bytes(needed))
            }
            false => format!("as many pieces of {SUM_BYTES} bytes as a warp can have"),
        };
        self.settle("combine_stages", self.given.combine_stages, stages[1], reason);
        Ok((warps, chosen))
    }

    /// As many as shared memory holds.
    pub fn plan_warps(&mut self) -> Result<usize, ConfigError> {
        let shared = self.hardware.shared_bytes;
        let bytes = |warps| PlanShared::bytes(&self.config, warps);
        let Some(warps) = WARPS.into_iter().rev().find(|&warps| bytes(warps) <= shared) else {
            let reason = "not even one warp of plan has room for its running counts".into();
            return Err(refuse("shared_bytes", shared, reason, Some(bytes(1))));
        };
        let (ranks, taken) = (self.workload.topology.world_size(), bytes(warps));
        let reason =
            format!("in plan's only block, their running counts for {ranks} ranks take {taken} bytes in all");
        Ok(self.settle("plan_warps", None, warps, reason))
    }

    /// As many as give a stream to every warp, unless tokens or memory are too few.
    pub fn channels(&mut self, warps: usize, plan_warps: usize, chunk: usize) -> usize {
        let (peers, remote, tokens) = (self.peers(), self.targets.remote_nodes, self.workload.tokens);
        let part = |part: f64, whole: f64| (warps as f64 * part / whole).ceil() as usize;
        // Kernels split their warps by tokens sent, forwarded and reduced.
        let (senders, reducers, forwarders) = match peers {
            0 => (0, 0, 0),
            _ => (
                part(remote, remote + self.targets.nodes),
                part(1.0, 1.0 + remote),
                part(remote, 1.0 + remote),
            ),
        };
        let wanted = senders.max(reducers).max(forwarders.div_ceil(peers.max(1))).max(plan_warps).min(1024);
        let mut derived = wanted.min((tokens / chunk).max(1));
        let mut reason = match peers {
            _ if derived < wanted => {
                format!("{tokens} tokens have so many whole chunks of {chunk}; warps could serve {wanted}")
            }
            0 => format!("plan's {plan_warps} warps walk one each; a single node has no rings to serve"),
            _ => format!(
                "of {warps} warps, {senders} senders or {reducers} reducers serve one each, {forwarders} combine \
                 forwarders a ring each of {peers} a channel, and plan's {plan_warps} warps walk one each"
            ),
        };
        let limit = self.hardware.ring_bytes;
        if self.given.channels.is_none() && self.both_rings(derived, chunk) > limit {
            let fits = (1..derived).rev().find(|&c| self.both_rings(c, chunk) <= limit).unwrap_or(1);
            reason = format!(
                "rings and send rings for {peers} peers take {}; with the {derived} that warps could serve they would \
                 take {}, more than {}",
                Bytes(self.both_rings(fits, chunk) as f64),
                Bytes(self.both_rings(derived, chunk) as f64),
                Bytes(limit as f64),
            );
            derived = fits;
        }
        self.settle("channels", self.given.channels, derived, reason)
    }

    /// Bytes of rings and send rings.
    fn both_rings(&self, channels: usize, chunk: usize) -> usize {
        let (dispatch, combine) = max_pitches(&self.config);
        let slots = self.given.ring_slots.unwrap_or(self.derived_slots(channels, chunk));
        (2 * channels * self.peers() * (dispatch + combine)).saturating_mul(slots)
    }

    /// Slots of each ring that are full while hop 1 runs at its bandwidth: data on its way, and credit on its way back.
    fn full_slots(&self, channels: usize) -> f64 {
        2.0 * self.hardware.hop1_in_flight() / (channels * self.peers() * self.pitch()) as f64
    }

    fn derived_slots(&self, channels: usize, chunk: usize) -> usize {
        if self.peers() == 0 {
            return chunk.next_power_of_two();
        }
        let full = self.full_slots(channels).min(u32::MAX as f64).ceil() as usize;
        // No more than a channel has tokens.
        let most = self.workload.tokens.div_ceil(channels).max(chunk);
        (full.max(chunk) + chunk).min(most).next_power_of_two()
    }

    /// What hop 1 holds in flight, and a chunk.
    pub fn ring_slots(&mut self, channels: usize, chunk: usize) -> usize {
        let derived = self.derived_slots(channels, chunk);
        let reason = match self.peers() {
            0 => format!("a single node has no rings; the configuration asks for a chunk, {chunk}"),
            peers => {
                let full = self.full_slots(channels);
                let holds = match full > chunk as f64 {
                    _ if derived < 2 * chunk => "all tokens of a channel",
                    true => "that and a chunk that is being written",
                    false => "two chunks, one on its way and one being written",
                };
                format!(
                    "over {channels} channels × {peers} peers, {} in flight (data there, credit back) are {full:.2} \
                     slots in each ring; it holds {holds}",
                    Bytes(2.0 * self.hardware.hop1_in_flight()),
                )
            }
        };
        self.settle("ring_slots", self.given.ring_slots, derived, reason)
    }

    /// What the busiest rank receives and returns.
    pub fn pool_bytes(&mut self) -> usize {
        let (workload, skew) = (self.workload, self.workload.skew);
        let mean = workload.tokens as f64 * self.targets.ranks;
        let most = workload.tokens * workload.topology.world_size();
        let rows = ((mean * skew).ceil() as usize).min(most);
        let bytes = |lane| RecvLayout::new(shape_of(workload, lane), rows).bytes;
        let limit = if rows == most { ", or all there are" } else { "" };
        let reason = format!(
            "a receive buffer and the experts' outputs for {rows} rows: {skew} times the mean of {mean:.0}{limit}"
        );
        let derived = bytes(Lane::Dispatch) + bytes(Lane::Combine);
        self.settle("pool_bytes", self.given.pool_bytes, derived, reason)
    }
}

/// What warps have under way, and where.
struct Stager<'a> {
    workload: &'a Workload,
    hardware: &'a Hardware,
    given: &'a Overrides,
    config: Config,
    blocks: usize,
    /// Bytes that a step reads, by lane.
    steps: [f64; 2],
}

impl<'a> Stager<'a> {
    fn new(chooser: &Chooser<'a>, blocks: usize, chunk: usize) -> Self {
        let Chooser { workload, hardware, given, ref config, targets, .. } = *chooser;
        let tokens = chunk.min(STEP_TOKENS) as f64;
        let rows = tokens * targets.ranks / targets.nodes;
        let steps = [tokens * workload.shape.row_bytes() as f64, rows * chooser.bf16_row() as f64];
        Self { workload, hardware, given, config: config.clone(), blocks, steps }
    }

    fn latency(&self) -> f64 {
        self.hardware.hop2_latency_us * 1e-6
    }

    /// Bytes that a warp of a block of `warps` must have under way to do its part, by lane.
    fn in_flight(&self, warps: usize) -> [f64; 2] {
        let rate = SPARE_WARPS * self.hardware.sm_gbs * 1e9 / warps as f64;
        self.steps.map(|bytes| {
            let copying = bytes / rate - STEP_WAITS * self.latency();
            if copying > 0.0 { bytes / copying * self.latency() } else { f64::INFINITY }
        })
    }

    fn map(&self, lane: Lane, staging: Staging) -> WarpMap {
        WarpMap::new(&self.config, lane, staging, &shape_of(self.workload, lane))
    }

    /// A warp's part of shared memory: its share is a multiple of 128 bytes.
    fn room(&self, warps: usize) -> usize {
        self.hardware.shared_bytes / warps / 128 * 128
    }

    fn fits(&self, lane: Lane, staging: Staging, warps: usize) -> bool {
        self.map(lane, staging).bytes as usize <= self.room(warps)
    }

    /// The largest stage of dispatch that is of use.
    fn row(&self) -> usize {
        align_up(2 * self.workload.shape.hidden, LEAST_STAGE)
    }

    /// Stages by lane, where none are given.
    fn derived_stages(&self, warps: usize) -> [usize; 2] {
        let rate = self.in_flight(warps)[1] / self.latency() / 1e9 * (self.blocks * warps) as f64;
        let mut combine = Staging::for_combine(rate, self.latency() * 1e9, self.blocks, warps);
        while combine.stages > 2 && !self.fits(Lane::Combine, combine, warps) {
            combine.stages /= 2;
        }
        [DISPATCH_STAGES, combine.stages]
    }

    /// The stages of both lanes for blocks of `warps`, if shared memory has room.
    fn stagings(&self, warps: usize) -> Option<[Staging; 2]> {
        let [dispatch, combine] = self.derived_stages(warps);
        let stages = self.given.dispatch_stages.unwrap_or(dispatch);
        let least = Staging { stage_bytes: LEAST_STAGE, stages };
        let combine =
            Staging { stage_bytes: SUM_BYTES, stages: self.given.combine_stages.unwrap_or(combine) };
        if !self.fits(Lane::Dispatch, least, warps) || !self.fits(Lane::Combine, combine, warps) {
            return None;
        }
        let spare = self.room(warps) - self.map(Lane::Dispatch, least).bytes as usize;
        let stage_bytes = (LEAST_STAGE + spare / stages / LEAST_STAGE * LEAST_STAGE).min(self.row());
        Some([Staging { stage_bytes, stages }, combine])
    }

    /// Whether the stages of `warps` hold what they must have under way.
    fn is_enough(&self, warps: usize) -> bool {
        let hold = |s: Staging| (s.stages * s.stage_bytes) as f64;
        let holds = self.stagings(warps).map(|stagings| stagings.map(hold));
        holds.is_some_and(|holds| {
            self.in_flight(warps).iter().zip(holds).all(|(needed, held)| *needed <= held)
        })
    }

    /// Shared memory that one warp takes at least.
    fn least_bytes(&self) -> usize {
        let least = |lane| {
            let staging = match lane {
                Lane::Dispatch => Staging {
                    stage_bytes: LEAST_STAGE,
                    stages: self.given.dispatch_stages.unwrap_or(DISPATCH_STAGES),
                },
                Lane::Combine => {
                    Staging { stage_bytes: SUM_BYTES, stages: self.given.combine_stages.unwrap_or(2) }
                }
            };
            self.map(lane, staging).bytes as usize
        };
        LANES.map(least).into_iter().max().unwrap_or(0)
    }
}

const _: () = assert!(LEAST_STAGE.is_multiple_of(ROW_ALIGN));
