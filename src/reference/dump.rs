//! Dumps: what one rank received and combined in one step, as a safetensors file that any checker can read.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::tensor::{Dtype, TensorView};

use crate::api::{Handle, RecvBuffer};
use crate::numeric::{ScaleFormat, scale_groups};
use crate::wire::shape::RowFormat;

/// Writes `step{step}-rank{rank}.safetensors` in `dir`: `recv_x` BF16 [R, H] (FP8: U8 codes, and `recv_x_scales` F32
/// [R, ceil(H/128)]; metadata `scale_format = "ue8m0"` where they are powers of two), `recv_topk_idx` I32 [R, K],
/// `recv_topk_weights` F32 [R, K], `recv_src_rank` and `recv_src_token` I32 `[R]`, `num_recv_tokens_per_expert` I32 [E
/// of the rank], `combined_x` BF16 [T, H].
///
/// # Errors
/// The file can't be written.
pub fn write(
    dir: &Path,
    step: usize,
    rank: usize,
    handle: &Handle,
    received: &RecvBuffer,
    combined: &[bf16],
) -> Result<PathBuf, safetensors::SafeTensorError> {
    let (shape, rows) = (received.shape(), received.rows());
    let ints = |values: Vec<u32>| values.into_iter().map(|value| value as i32).collect::<Vec<i32>>();
    let src_rank = ints(received.sources().iter().map(|source| source.rank).collect());
    let src_token = ints(received.sources().iter().map(|source| source.token).collect());
    let per_expert = handle.num_recv_tokens_per_expert(1).iter().map(|&n| n as i32).collect::<Vec<_>>();
    let scales = received.scales();
    let mut tensors = Vec::new();
    let mut add =
        |name: &'static str, dtype, shape: Vec<usize>, bytes| -> Result<(), safetensors::SafeTensorError> {
            tensors.push((name, TensorView::new(dtype, shape, bytes)?));
            Ok(())
        };
    match shape.format {
        RowFormat::Bf16 => add("recv_x", Dtype::BF16, vec![rows, shape.hidden], bytes(received.bf16()))?,
        RowFormat::Fp8(_) => {
            add("recv_x", Dtype::U8, vec![rows, shape.hidden], received.e4m3())?;
            add("recv_x_scales", Dtype::F32, vec![rows, scale_groups(shape.hidden)], bytes(&scales))?;
        }
    }
    add("recv_topk_idx", Dtype::I32, vec![rows, shape.topk], bytes(received.topk_idx()))?;
    add("recv_topk_weights", Dtype::F32, vec![rows, shape.topk], bytes(received.topk_weights()))?;
    add("recv_src_rank", Dtype::I32, vec![rows], bytes(&src_rank))?;
    add("recv_src_token", Dtype::I32, vec![rows], bytes(&src_token))?;
    add("num_recv_tokens_per_expert", Dtype::I32, vec![per_expert.len()], bytes(&per_expert))?;
    add("combined_x", Dtype::BF16, vec![handle.num_tokens(), shape.hidden], bytes(combined))?;
    let power_of_two = shape.format == RowFormat::Fp8(ScaleFormat::Ue8m0);
    let metadata = power_of_two.then(|| HashMap::from([("scale_format".to_string(), "ue8m0".to_string())]));
    let path = dir.join(format!("step{step}-rank{rank}.safetensors"));
    safetensors::serialize_to_file(tensors, metadata, &path)?;
    Ok(path)
}

fn bytes<T: bytemuck::Pod>(values: &[T]) -> &[u8] {
    bytemuck::cast_slice(values)
}
