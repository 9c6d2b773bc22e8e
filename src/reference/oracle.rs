//! The oracle: what every rank must receive and get back, from the definition and nothing else. It shares no
//! code with the protocol or the row arithmetic, only the layout of nodes, ranks and experts.

use std::borrow::Cow;

use float8::F8E4M3;
use half::bf16;

use super::experts::factor;
use crate::config::Config;
use crate::numeric::ScaleFormat;
use crate::wire::shape::RowFormat;

/// The tokens of one rank.
#[derive(Debug, Clone, Default)]
pub struct RankTokens<'a> {
    /// Global experts [T, K], −1 = masked.
    pub topk_idx: Cow<'a, [i64]>,
    /// Weights [T, K].
    pub topk_weights: Cow<'a, [f32]>,
    /// BF16 rows [T, hidden].
    pub x: Cow<'a, [bf16]>,
}

/// A world's tokens, by rank.
pub struct Oracle<'a> {
    /// Nodes, ranks and experts.
    pub config: &'a Config,
    /// Elements per row.
    pub hidden: usize,
    /// Entries per token.
    pub topk: usize,
    /// Format that rows are dispatched in.
    pub format: RowFormat,
    /// By rank.
    pub ranks: Vec<RankTokens<'a>>,
}

/// What a rank must receive, row by row.
#[derive(Debug, Default, PartialEq)]
pub struct Received {
    /// Bits of BF16 elements, or E4M3 codes.
    pub x: Vec<u16>,
    /// Bits of the scales, FP8 only.
    pub scales: Vec<u32>,
    /// Local expert indices, −1 elsewhere.
    pub topk_idx: Vec<i32>,
    /// Bits of the weights, 0 elsewhere.
    pub topk_weights: Vec<u32>,
    /// Source (rank, token).
    pub sources: Vec<(u32, u32)>,
    /// Entries per local expert.
    pub tokens_per_expert: Vec<usize>,
}

impl Oracle<'_> {
    fn row(&self, rank: usize, token: usize) -> &[bf16] {
        &self.ranks[rank].x[token * self.hidden..][..self.hidden]
    }

    /// A token's experts, with their weights, in k order; `None` where masked or on another rank than `at`.
    fn entries(&self, rank: usize, token: usize, at: usize) -> impl Iterator<Item = Option<(usize, f32)>> {
        let tokens = &self.ranks[rank];
        let entries = token * self.topk..(token + 1) * self.topk;
        tokens.topk_idx[entries.clone()].iter().zip(&tokens.topk_weights[entries]).map(
            move |(&expert, &weight)| {
                let here = expert >= 0 && self.config.placement().rank_of(expert as usize) == at;
                here.then_some((expert as usize, weight))
            },
        )
    }

    fn tokens(&self, rank: usize) -> usize {
        self.ranks[rank].topk_idx.len() / self.topk
    }

    /// What `at` receives: every token that names one of its experts, by (source rank, source token).
    pub fn received(&self, at: usize) -> Received {
        let placement = self.config.placement();
        let mut received =
            Received { tokens_per_expert: vec![0; placement.experts_of(at).len()], ..Default::default() };
        for rank in 0..self.ranks.len() {
            for token in 0..self.tokens(rank) {
                if self.entries(rank, token, at).flatten().next().is_none() {
                    continue;
                }
                received.sources.push((rank as u32, token as u32));
                for entry in self.entries(rank, token, at) {
                    let local = entry.map(|(expert, _)| placement.local_index(expert));
                    received.topk_idx.push(local.map_or(-1, |local| local as i32));
                    received.topk_weights.push(entry.map_or(0, |(_, weight)| weight.to_bits()));
                    local.into_iter().for_each(|local| received.tokens_per_expert[local] += 1);
                }
                match self.format {
                    RowFormat::Bf16 => received.x.extend(self.row(rank, token).iter().map(|x| x.to_bits())),
                    RowFormat::Fp8(format) => {
                        for group in self.row(rank, token).chunks(128) {
                            let (codes, scale) = quantise(group, format);
                            received.x.extend(codes.iter().map(|code| u16::from(code.to_bits())));
                            received.scales.push(scale.to_bits());
                        }
                    }
                }
            }
        }
        received
    }

    /// The rows [T, hidden] that come back to `rank` after the test experts.
    pub fn combined(&self, rank: usize) -> Vec<bf16> {
        (0..self.tokens(rank)).flat_map(|token| self.combined_row(rank, token)).collect()
    }

    fn combined_row(&self, home: usize, token: usize) -> Vec<bf16> {
        let topology = self.config.topology();
        let x = self.as_dispatched(home, token);
        let mut total = vec![0f32; self.hidden];
        for node in 0..topology.nodes() {
            let mut partial = vec![0f32; self.hidden];
            let mut any = false;
            for rank in (0..topology.ranks_per_node()).map(|local| topology.rank(node, local)) {
                if self.entries(home, token, rank).flatten().next().is_some() {
                    any = true;
                    add(&mut partial, self.expert(home, token, rank, &x).map(round));
                }
            }
            match (any, node == topology.node_of(home)) {
                (false, _) => {}
                // The own node's partial sum stays f32; only what crosses the rail is rounded.
                (true, true) => add(&mut total, partial.into_iter()),
                (true, false) => add(&mut total, partial.into_iter().map(round)),
            }
        }
        total.into_iter().map(|sum| bf16::from_bits((round(sum).to_bits() >> 16) as u16)).collect()
    }

    /// The row as the experts see it.
    fn as_dispatched(&self, rank: usize, token: usize) -> Vec<f32> {
        let row = self.row(rank, token);
        match self.format {
            RowFormat::Bf16 => row.iter().map(|x| x.to_f32()).collect(),
            RowFormat::Fp8(format) => {
                let groups = row.chunks(128).map(|group| quantise(group, format));
                groups
                    .flat_map(|(codes, scale)| codes.into_iter().map(move |code| code.to_f32() * scale))
                    .collect()
            }
        }
    }

    /// The output of the test experts of `at`.
    fn expert(&self, home: usize, token: usize, at: usize, x: &[f32]) -> impl Iterator<Item = f32> {
        let mut sum = vec![0f32; self.hidden];
        for (expert, weight) in self.entries(home, token, at).flatten() {
            let factor = factor(weight, expert as u32);
            add(&mut sum, x.iter().map(|x| factor * x));
        }
        sum.into_iter()
    }
}

fn add(sums: &mut [f32], terms: impl Iterator<Item = f32>) {
    sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
}

/// To the nearest BF16, as f32; every NaN to 0x7FC0.
fn round(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(0x7fc0_0000) } else { bf16::from_f32(x).to_f32() }
}

fn quantise(group: &[bf16], format: ScaleFormat) -> (Vec<F8E4M3>, f32) {
    let finite = group.iter().map(|x| x.to_f32().abs()).filter(|x| x.is_finite());
    let a = finite.fold(1e-4, f32::max);
    let (scale, gain) = match format {
        ScaleFormat::F32 => (a / 448.0, 448.0 / a),
        ScaleFormat::Ue8m0 => {
            let least = f64::from(a / 448.0);
            let scale =
                (-126..128).map(|e| 2f64.powi(e)).find(|&power| power >= least).unwrap_or(f64::MAX) as f32;
            (scale, 1.0 / scale)
        }
    };
    let code = |x: &bf16| match x.to_f32() {
        nan if nan.is_nan() => F8E4M3::from_bits(0x7f),
        x => F8E4M3::from_f32(x * gain),
    };
    (group.iter().map(code).collect(), scale)
}
