//! Compares what a rank got with the oracle, bit for bit, and names the first difference.

use std::fmt::Debug;

use half::bf16;

use super::oracle::{Oracle, Received};
use crate::api::{Handle, RecvBuffer};

/// Compares what `rank` received and combined with the oracle.
///
/// # Errors
/// The first difference, in words.
pub fn verify(
    oracle: &Oracle<'_>,
    rank: usize,
    handle: &Handle,
    received: &RecvBuffer,
    combined: &[bf16],
) -> Result<(), String> {
    let (expected, got) = (oracle.received(rank), as_received(handle, received));
    let widths = (oracle.topk, oracle.hidden, oracle.hidden.div_ceil(128));
    let (topk, hidden, groups) = widths;
    same("source", 1, &expected.sources, &got.sources)?;
    same("num_recv_tokens_per_expert", 1, &expected.tokens_per_expert, &got.tokens_per_expert)?;
    same("recv_topk_idx", topk, &expected.topk_idx, &got.topk_idx)?;
    same("recv_topk_weights (bits)", topk, &expected.topk_weights, &got.topk_weights)?;
    same("recv_x_scales (bits)", groups, &expected.scales, &got.scales)?;
    same("recv_x (bits)", hidden, &expected.x, &got.x)?;
    let bits = |row: &[bf16]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    same("combined_x (bits)", hidden, &bits(&oracle.combined(rank)), &bits(combined))
}

fn as_received(handle: &Handle, buffer: &RecvBuffer) -> Received {
    let codes = buffer.e4m3().iter().map(|&code| u16::from(code));
    Received {
        x: buffer.bf16().iter().map(|x| x.to_bits()).chain(codes).collect(),
        scales: buffer.scales().iter().map(|scale| scale.to_bits()).collect(),
        topk_idx: buffer.topk_idx().to_vec(),
        topk_weights: buffer.topk_weights().iter().map(|weight| weight.to_bits()).collect(),
        sources: buffer.sources().iter().map(|source| (source.rank, source.token)).collect(),
        tokens_per_expert: handle.num_recv_tokens_per_expert(1),
    }
}

fn same<T: PartialEq + Debug>(what: &str, width: usize, expected: &[T], got: &[T]) -> Result<(), String> {
    if expected.len() != got.len() {
        return Err(format!("{what} has {} elements, {} expected", got.len(), expected.len()));
    }
    match expected.iter().zip(got).position(|(expected, got)| expected != got) {
        None => Ok(()),
        Some(at) => {
            let (row, column) = (at / width, at % width);
            Err(format!("{what}[{row}][{column}] is {:?}, {:?} expected", got[at], expected[at]))
        }
    }
}
