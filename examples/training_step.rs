//! A training step of one MoE layer, forward and backward, with two micro-batches overlapped, on two nodes of
//! two ranks in one process: on CUDA devices where there are any, else on the host.
//!
//! The layer is `y_t = Σ_k w_tk · W_e(t,k) · x_t`, with a small matrix for each expert and the loss `Σ c · y`.
//! While a rank's thread runs the experts of one micro-batch, the engine moves the rows of the other:
//!
//! | thread of the rank | engine                              |
//! |--------------------|-------------------------------------|
//! |                    | plans; dispatch 1                   |
//! | experts 1          | dispatch 2                          |
//! | experts 2          | combine 1                           |
//! |                    | combine 2, dispatch of gradients 1  |
//! | backward experts 1 | dispatch of gradients 2             |
//! | backward experts 2 | combine of gradients 1              |
//! |                    | combine of gradients 2              |
//!
//! The backward of combine is a cached dispatch: the same handle, no counts. The backward of dispatch is a
//! combine, which brings the gradients of the weights home as well.
//!
//! The check knows the forward pass only, on all tokens in one loop. The layer is linear in its input, in its
//! weights and in its experts, so that a difference of two losses *is* the derivative; and the values are small
//! multiples of ½, so that no sum is ever rounded, in whatever order. Hence all comparisons are exact.

use std::process::ExitCode;

use half::bf16;
use railhop::config::Staging;
use railhop::error::DeviceError;
use railhop::{
    Combine, Communicator, Config, Cuda, EngineKind, Error, Handle, LocalWorld, RecvBuffer, Routing,
    RowFormat, RowShape,
};

const TOKENS: usize = 32;
const HIDDEN: usize = 64;
const TOPK: usize = 4;
const EXPERTS: usize = 8;
const RANKS: usize = 4;
/// Bytes of a rank's pool: buffers here are small, and memory of devices is not taken by the page as it is used.
const POOL: usize = 4 << 20;
const SHAPE: RowShape = RowShape { hidden: HIDDEN, topk: TOPK, format: RowFormat::Bf16 };

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Kernels on the devices that are here, or threads of the host: the rest of the program is the same. Says which.
fn engine() -> EngineKind {
    match railhop::device::cuda::devices() {
        Ok(names) if !names.is_empty() => {
            let devices: Vec<_> = (0..names.len().min(RANKS)).collect();
            println!("CUDA engine: {RANKS} ranks on {}", names[..devices.len()].join(", "));
            // Few and small blocks: ranks may share a device, and have little to do.
            let (dispatch, combine) =
                (Staging { stage_bytes: 512, stages: 4 }, Staging { stage_bytes: 1024, stages: 4 });
            EngineKind::Cuda(Cuda {
                devices,
                blocks: 2,
                warps: 4,
                plan_warps: 4,
                dispatch,
                combine,
                ..Cuda::default()
            })
        }
        none => {
            let why = none.err().unwrap_or(DeviceError::NoDevice { device: 0, count: 0 });
            println!("host engine ({why})");
            EngineKind::Host
        }
    }
}

/// What to do about an error, if it is known.
fn advise(error: Error) -> String {
    let queues = "CUDA_DEVICE_MAX_CONNECTIONS";
    match &error {
        Error::Device(DeviceError::Unsupported { what, .. }) if what.contains(queues) => {
            format!("{error}\nranks share a device here: set {queues}=32 and run it again")
        }
        _ => error.to_string(),
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::builder(railhop::Topology::new(2, RANKS / 2)?).experts(EXPERTS).max_hidden(HIDDEN);
    let config = config.max_topk(TOPK).max_tokens(TOKENS).pool_bytes(POOL).build()?.on(engine());
    let placement = config.placement().clone();
    let world = LocalWorld::new(config).map_err(advise)?;
    let ranks: Vec<Step> = world.run(step).into_iter().collect::<Result<_, _>>()?;

    let experts: Vec<_> = (0..EXPERTS).map(matrix).collect();
    let batches: Vec<_> = (0..2 * RANKS).map(|i| Batch::new(i / 2, i % 2)).collect();
    let mut checked = [0; 3];
    for (rank, step) in ranks.iter().enumerate() {
        println!("rank {rank}: {:?} rows received", step.rows);
        for (batch, results) in batches[2 * rank..].iter().zip(&step.results) {
            let both = results.iter().zip(batch.expected(&experts)).zip(&mut checked);
            for (what, ((result, expected), checked)) in ["y", "dx", "dw"].iter().zip(both) {
                if *result != expected {
                    return Err(format!("rank {rank}: {what} is not what one loop makes of it").into());
                }
                *checked += result.len();
            }
        }
    }
    // The gradients of the experts, at some elements: all tokens of all ranks are in them.
    let loss = |experts: &[Vec<f32>]| -> f32 { batches.iter().map(|batch| batch.total_loss(experts)).sum() };
    let mut elements = 0;
    for expert in 0..EXPERTS {
        let gradient = &ranks[placement.rank_of(expert)].experts[placement.local_index(expert)];
        for at in (expert..HIDDEN * HIDDEN).step_by(521) {
            let mut moved = experts.clone();
            moved[expert][at] += 1.0;
            if gradient[at] != loss(&moved) - loss(&experts) {
                return Err(format!("expert {expert}: element {at} has another gradient").into());
            }
            elements += 1;
        }
    }
    let [y, dx, dw] = checked;
    println!("exactly as in one loop over all tokens: {y} outputs, and the gradients of");
    println!("{dx} inputs, {dw} weights and {elements} elements of the experts (by differences of the loss)");
    Ok(())
}

/// What a rank comes to.
struct Step {
    rows: [usize; 2],
    results: [Results; 2],
    /// Gradients of its experts' matrices, by local index.
    experts: Vec<Vec<f32>>,
}

/// Of a micro-batch: y [T, hidden], and the gradients dx [T, hidden] and dw [T, K].
type Results = [Vec<f32>; 3];

/// One rank's training step.
fn step(mut comm: Communicator) -> Result<Step, railhop::Error> {
    let batches = [0, 1].map(|micro| Batch::new(comm.rank(), micro));
    let [a, b] = &batches;
    let mut experts = Experts::new(comm.config().placement().experts_of(comm.rank()));

    // Forward.
    let plans = [comm.start_plan(a.routing()), comm.start_plan(b.routing())];
    let [plan_a, plan_b] = plans.map(|plan| plan.wait());
    let (plan_a, plan_b) = (plan_a?, plan_b?);
    let lend = |comm: &Communicator, plan: &Handle| comm.recv_buffer(plan.num_recv_tokens(), SHAPE);
    let (into_a, into_b) = (lend(&comm, &plan_a)?, lend(&comm, &plan_b)?);
    let (mut out_a, mut out_b) = (lend(&comm, &plan_a)?, lend(&comm, &plan_b)?);

    let received_a = comm.dispatch(&plan_a, a.x.clone(), into_a)?.buffer;
    let dispatch_b = comm.start_dispatch(&plan_b, b.x.clone(), into_b);
    experts.forward(&received_a, &mut out_a);
    let combine_a = comm.start_combine(&plan_a, Combine::new(out_a));
    let received_b = dispatch_b.wait()?.buffer;
    experts.forward(&received_b, &mut out_b);
    let combine_b = comm.start_combine(&plan_b, Combine::new(out_b));
    let out_a = combine_a.wait()?;

    // Backward. The buffers of the forward outputs take the gradients; what was received is still needed.
    let gradients_a = comm.start_dispatch(&plan_a, a.c.clone(), out_a.outputs);
    let out_b = combine_b.wait()?;
    let mut gradients_a = gradients_a.wait()?.buffer;
    let gradients_b = comm.start_dispatch(&plan_b, b.c.clone(), out_b.outputs);
    experts.backward(&received_a, &mut gradients_a);
    let home_a = comm.start_combine(&plan_a, Combine::new(gradients_a).with_topk_weights());
    let mut gradients_b = gradients_b.wait()?.buffer;
    experts.backward(&received_b, &mut gradients_b);
    let home_b = comm.start_combine(&plan_b, Combine::new(gradients_b).with_topk_weights());
    let (home_a, home_b) = (home_a.wait()?, home_b.wait()?);

    let rows = [received_a.rows(), received_b.rows()];
    let results = [(out_a.x, home_a), (out_b.x, home_b)];
    let wide = |rows: Vec<bf16>| rows.iter().map(|x| x.to_f32()).collect();
    let results = results.map(|(y, home)| [wide(y), wide(home.x), home.topk_weights]);
    Ok(Step { rows, results, experts: experts.gradients })
}

/// A rank's experts, and the gradients of their matrices.
struct Experts {
    matrices: Vec<Vec<f32>>,
    gradients: Vec<Vec<f32>>,
}

impl Experts {
    fn new(ids: &[u32]) -> Self {
        let matrices: Vec<_> = ids.iter().map(|&id| matrix(id as usize)).collect();
        Self { gradients: vec![vec![0.0; HIDDEN * HIDDEN]; matrices.len()], matrices }
    }

    /// Each row's sum over its experts here: `Σ_k w_k · W_e · x`.
    fn forward(&self, received: &RecvBuffer, out: &mut RecvBuffer) {
        out.set_rows(received.rows());
        for (r, out) in out.bf16_mut().chunks_exact_mut(HIDDEN).enumerate() {
            let (x, mut sum) = (row(received.bf16(), r), [0.0; HIDDEN]);
            for (_, expert, weight) in entries(received, r) {
                let z = multiply(&self.matrices[expert], &x);
                sum.iter_mut().zip(z).for_each(|(sum, z)| *sum += weight * z);
            }
            out.iter_mut().zip(sum).for_each(|(out, sum)| *out = bf16::from_f32(sum));
        }
    }

    /// Turns the gradients of the outputs into those of the received rows and weights, in place, and adds to
    /// the gradients of the matrices.
    fn backward(&mut self, received: &RecvBuffer, gradients: &mut RecvBuffer) {
        for r in 0..received.rows() {
            let (x, dy, mut dx) = (row(received.bf16(), r), row(gradients.bf16(), r), [0.0; HIDDEN]);
            gradients.topk_weights_mut()[r * TOPK..][..TOPK].fill(0.0);
            for (k, expert, weight) in entries(received, r) {
                gradients.topk_weights_mut()[r * TOPK + k] = dot(&dy, &multiply(&self.matrices[expert], &x));
                let lines = self.matrices[expert].chunks_exact(HIDDEN);
                let lines = lines.zip(self.gradients[expert].chunks_exact_mut(HIDDEN));
                for ((line, gradient), dy) in lines.zip(dy) {
                    dx.iter_mut().zip(line).for_each(|(dx, w)| *dx += weight * dy * w);
                    gradient.iter_mut().zip(x).for_each(|(gradient, x)| *gradient += weight * dy * x);
                }
            }
            let out = gradients.bf16_mut()[r * HIDDEN..].iter_mut();
            out.zip(dx).for_each(|(out, dx)| *out = bf16::from_f32(dx));
        }
    }
}

/// Row `r`'s experts on this rank: (k, local index, weight).
fn entries(buffer: &RecvBuffer, r: usize) -> impl Iterator<Item = (usize, usize, f32)> {
    let entries = buffer.topk_idx()[r * TOPK..].iter().zip(&buffer.topk_weights()[r * TOPK..]).take(TOPK);
    entries.enumerate().filter(|(_, (e, _))| **e >= 0).map(|(k, (&e, &w))| (k, e as usize, w))
}

fn row(rows: &[bf16], r: usize) -> [f32; HIDDEN] {
    std::array::from_fn(|i| rows[r * HIDDEN + i].to_f32())
}

fn multiply(matrix: &[f32], x: &[f32; HIDDEN]) -> [f32; HIDDEN] {
    std::array::from_fn(|i| dot(&matrix[i * HIDDEN..][..HIDDEN], x))
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// An arbitrary integer from −2 to 2.
fn small(seed: usize, i: usize) -> f32 {
    let hash = ((seed << 20) + i + 1) as u64 * 0x9e37_79b9;
    ((hash ^ hash >> 15).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 % 5.0 - 2.0
}

/// An expert's matrix [out, in]: two elements of ±1 in each row and column.
fn matrix(expert: usize) -> Vec<f32> {
    let mut matrix = vec![0.0; HIDDEN * HIDDEN];
    for i in 0..HIDDEN {
        matrix[i * HIDDEN + (i + expert + 1) % HIDDEN] = 1.0;
        matrix[i * HIDDEN + (i + 2 * expert + 17) % HIDDEN] = if small(expert, i) > 0.0 { 1.0 } else { -1.0 };
    }
    matrix
}

/// A rank's tokens in a micro-batch, and their share of the loss, `Σ c · y`.
struct Batch {
    topk_idx: Vec<i64>,
    topk_weights: Vec<f32>,
    x: Vec<bf16>,
    c: Vec<bf16>,
}

impl Batch {
    fn new(rank: usize, micro: usize) -> Self {
        let seed = 10 * (2 * rank + micro);
        let rows = |seed| (0..TOKENS * HIDDEN).map(|i| bf16::from_f32(small(seed, i))).collect();
        // Different experts for a token, a few of them masked.
        let expert = |i: usize| (small(seed, i / TOPK) as i64 + 2 + (i / TOPK + 3 * (i % TOPK)) as i64) % 8;
        let topk_idx = (0..TOKENS * TOPK).map(|i| if i % 7 == 3 { -1 } else { expert(i) }).collect();
        let topk_weights = (0..TOKENS * TOPK).map(|i| if i % 3 == 0 { 1.0 } else { 0.5 }).collect();
        Self { topk_idx, topk_weights, x: rows(seed + 1), c: rows(seed + 2) }
    }

    fn routing(&self) -> Routing<'_> {
        Routing { topk: TOPK, topk_idx: &self.topk_idx, topk_weights: &self.topk_weights }
    }

    /// What the layer makes of token `t`, were its row `x` and its weights `w`.
    fn output(&self, t: usize, x: &[f32; HIDDEN], w: &[f32], experts: &[Vec<f32>]) -> [f32; HIDDEN] {
        let mut y = [0.0; HIDDEN];
        for (&expert, w) in self.topk_idx[t * TOPK..].iter().zip(w).filter(|(expert, _)| **expert >= 0) {
            y.iter_mut().zip(multiply(&experts[expert as usize], x)).for_each(|(y, z)| *y += w * z);
        }
        y
    }

    fn loss(&self, t: usize, x: &[f32; HIDDEN], w: &[f32], experts: &[Vec<f32>]) -> f32 {
        dot(&row(&self.c, t), &self.output(t, x, w, experts))
    }

    fn total_loss(&self, experts: &[Vec<f32>]) -> f32 {
        let weights = self.topk_weights.chunks_exact(TOPK).enumerate();
        weights.map(|(t, w)| self.loss(t, &row(&self.x, t), w, experts)).sum()
    }

    /// The outputs, and how the loss changes as each input and each weight grows by one.
    fn expected(&self, experts: &[Vec<f32>]) -> Results {
        let [mut y, mut dx, mut dw] = Results::default();
        for (t, w) in self.topk_weights.chunks_exact(TOPK).enumerate() {
            let x = row(&self.x, t);
            let loss = self.loss(t, &x, w, experts);
            y.extend(self.output(t, &x, w, experts));
            for i in 0..HIDDEN {
                let mut x = x;
                x[i] += 1.0;
                dx.push(self.loss(t, &x, w, experts) - loss);
            }
            for k in 0..TOPK {
                let mut w = w.to_vec();
                w[k] += 1.0;
                dw.push(self.loss(t, &x, &w, experts) - loss);
            }
        }
        [y, dx, dw]
    }
}
