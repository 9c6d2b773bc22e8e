//! Arithmetic and bulk copies on rows: the weighted-free sum of a token's rows ([`reduce`](mod@reduce)), the
//! FP8 payload format ([`fp8`]) and non-temporal copies ([`copy`]).
//!
//! Every function gives the same bits on every machine: the vector paths are recompilations of the
//! portable code, sums start at `+0.0` and run in a fixed order, nothing is fused and denormals are kept.

pub mod copy;
pub mod fp8;
pub mod reduce;

pub use fp8::{GROUP, ScaleFormat, decode, dequantise, quantise, scale_groups};
pub use reduce::{Reduction, bf16_to_f32, reduce, round_bf16};
