//! Test experts. A row's output depends on the row, on its weights and on the *global* ids of its experts, so
//! that a row at the wrong place, with the wrong weight or the wrong local index shows.

use half::bf16;

use crate::api::RecvBuffer;
use crate::numeric::{dequantise, round_bf16};
use crate::wire::shape::RowFormat;

/// The factor of `expert` on a row with weight `weight`.
pub fn factor(weight: f32, expert: u32) -> f32 {
    weight * (1.0 + (expert % 7) as f32 / 8.0)
}

/// Runs the experts of a rank, `experts` (global ids, by local index), over the rows of `received`:
/// `y = bf16(Σ over the row's local experts, in k order, in f32: (w_k · (1 + (e mod 7)/8)) · x)`, each product
/// and sum rounded to f32. FP8 rows are dequantised first. `out` is [R, hidden].
pub fn run(received: &RecvBuffer, experts: &[u32], out: &mut [bf16]) {
    let shape = received.shape();
    let (mut row, mut sum) = (vec![0f32; shape.hidden], vec![0f32; shape.hidden]);
    for (r, out) in out.chunks_exact_mut(shape.hidden).enumerate() {
        let elements = r * shape.hidden..(r + 1) * shape.hidden;
        match shape.format {
            RowFormat::Bf16 => {
                row.iter_mut().zip(&received.bf16()[elements]).for_each(|(x, value)| *x = value.to_f32());
            }
            RowFormat::Fp8(format) => {
                let scales = &received.scale_rows()[r * shape.scale_pitch()..][..shape.scale_pitch()];
                dequantise(&received.e4m3()[elements], format, scales, &mut row);
            }
        }
        sum.fill(0.0);
        let entries = r * shape.topk..(r + 1) * shape.topk;
        let local = received.topk_idx()[entries.clone()].iter().zip(&received.topk_weights()[entries]);
        for (&index, &weight) in local.filter(|(index, _)| **index >= 0) {
            let factor = factor(weight, experts[index as usize]);
            sum.iter_mut().zip(&row).for_each(|(sum, x)| *sum += factor * x);
        }
        out.iter_mut().zip(&sum).for_each(|(out, &sum)| *out = round_bf16(sum));
    }
}
