//! Traces: tokens and their routing, recorded from real text.
//!
//! A trace is a safetensors file with `x` BF16 [N, H], `topk_idx` I64 [N, K], `topk_weights` F32 [N, K] and the
//! string metadata `num_experts` and `num_topk`. In step s of a world of W ranks with T tokens each, rank r
//! takes rows (s·W + r)·T to (s·W + r + 1)·T; the last may be short or empty.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use half::bf16;
use safetensors::{Dtype, SafeTensors};

use super::oracle::RankTokens;

/// A recorded trace, checked.
#[derive(Debug)]
pub struct Trace {
    /// Number of experts the routing chooses from.
    pub num_experts: usize,
    /// Entries per token, K.
    pub topk: usize,
    /// Elements per row, H.
    pub hidden: usize,
    x: Vec<bf16>,
    topk_idx: Vec<i64>,
    topk_weights: Vec<f32>,
}

/// Why a file is no trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file can't be read.
    #[error("can't read it: {0}")]
    Io(#[from] std::io::Error),
    /// The file is truncated, or no safetensors file.
    #[error("not a whole safetensors file: {0}")]
    Format(#[from] safetensors::SafeTensorError),
    /// It is a safetensors file, but no trace.
    #[error("not a trace: {0}")]
    Content(String),
}

impl Trace {
    /// Reads and checks the trace at `path`.
    ///
    /// # Errors
    /// The file can't be read, is truncated or foreign, or its parts do not fit each other.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, TraceError> {
        let bytes = std::fs::read(path)?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let file = SafeTensors::deserialize(&bytes)?;
        let metadata = header.metadata().as_ref();
        let number = |key: &str| {
            let text = metadata.and_then(|metadata| metadata.get(key));
            let text = text.ok_or_else(|| TraceError::Content(format!("metadata {key} is missing")))?;
            let parse = text.parse::<usize>();
            parse.map_err(|_| TraceError::Content(format!("metadata {key} = {text:?} is no number")))
        };
        let (num_experts, num_topk) = (number("num_experts")?, number("num_topk")?);
        let (x, [rows, hidden]) = tensor(&file, "x", Dtype::BF16)?;
        let (topk_idx, idx_shape) = tensor(&file, "topk_idx", Dtype::I64)?;
        let (topk_weights, weights_shape) = tensor(&file, "topk_weights", Dtype::F32)?;
        for (name, shape) in [("topk_idx", idx_shape), ("topk_weights", weights_shape)] {
            if shape != [rows, num_topk] {
                let text = format!("{name} has shape {shape:?}, [{rows}, {num_topk}] expected");
                return Err(TraceError::Content(text));
            }
        }
        if rows == 0 || hidden == 0 || num_topk == 0 || num_experts == 0 {
            let text = format!(
                "{rows} rows of {hidden} elements, top-{num_topk} of {num_experts}: nothing to replay"
            );
            return Err(TraceError::Content(text));
        }
        Ok(Self { num_experts, topk: num_topk, hidden, x, topk_idx, topk_weights })
    }

    /// Its content as one number: processes that replay the same trace have it in common.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = blake3::Hasher::new();
        for number in [self.num_experts, self.topk, self.hidden] {
            hasher.update(&(number as u64).to_le_bytes());
        }
        hasher.update(bytemuck::cast_slice(&self.x));
        hasher.update(bytemuck::cast_slice(&self.topk_idx));
        hasher.update(bytemuck::cast_slice(&self.topk_weights));
        u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("32 bytes"))
    }

    /// Number of rows, N.
    pub fn rows(&self) -> usize {
        self.x.len() / self.hidden
    }

    /// Steps of a world of `world_size` ranks with `tokens_per_rank` tokens each; the last may be short.
    ///
    /// # Panics
    /// One of the two is 0.
    pub fn steps(&self, world_size: usize, tokens_per_rank: usize) -> usize {
        self.rows().div_ceil(world_size * tokens_per_rank)
    }

    /// The tokens of every rank in `step`.
    pub fn step(&self, step: usize, world_size: usize, tokens_per_rank: usize) -> Vec<RankTokens<'_>> {
        let rows = |rank: usize| {
            let start = (step * world_size + rank) * tokens_per_rank;
            start.min(self.rows())..(start + tokens_per_rank).min(self.rows())
        };
        (0..world_size).map(|rank| self.tokens(rows(rank))).collect()
    }

    fn tokens(&self, rows: Range<usize>) -> RankTokens<'_> {
        let of = |width: usize| rows.start * width..rows.end * width;
        RankTokens {
            topk_idx: Cow::Borrowed(&self.topk_idx[of(self.topk)]),
            topk_weights: Cow::Borrowed(&self.topk_weights[of(self.topk)]),
            x: Cow::Borrowed(&self.x[of(self.hidden)]),
        }
    }
}

/// A tensor with two dimensions.
fn tensor<T: bytemuck::Pod>(
    file: &SafeTensors<'_>,
    name: &str,
    dtype: Dtype,
) -> Result<(Vec<T>, [usize; 2]), TraceError> {
    let view = file.tensor(name).map_err(|_| TraceError::Content(format!("tensor {name} is missing")))?;
    let shape = <[usize; 2]>::try_from(view.shape());
    match shape {
        Ok(shape) if view.dtype() == dtype => Ok((bytemuck::pod_collect_to_vec(view.data()), shape)),
        _ => {
            let text = format!(
                "{name} is {:?} {:?}, {dtype:?} with two dimensions expected",
                view.dtype(),
                view.shape()
            );
            Err(TraceError::Content(text))
        }
    }
}
