//! The forward and backward pass of an MoE layer's communication, on two nodes of two ranks in one process.
//!
//! The experts scale their rows by a constant, so that the gradient is known: every rank checks its own.

use half::bf16;
use railhop::{
    Combine, Communicator, Config, ExpertMajor, LocalWorld, Routing, RowFormat, RowShape, Topology,
};

const TOKENS: usize = 6;
const HIDDEN: usize = 64;
const TOPK: usize = 2;
const EXPERTS: usize = 8;
const GAIN: f32 = 0.5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::builder(Topology::new(2, 2)?).experts(EXPERTS).max_hidden(HIDDEN).build()?;
    println!("each rank's region: {:?}", config.memory());
    for result in LocalWorld::new(config)?.run(layer) {
        println!("{}", result?);
    }
    Ok(())
}

/// One rank's layer, forward and backward.
fn layer(mut comm: Communicator) -> Result<String, railhop::Error> {
    let topk_idx: Vec<i64> = (0..TOKENS * TOPK).map(|i| ((comm.rank() + i * 3) % EXPERTS) as i64).collect();
    let routing = Routing { topk: TOPK, topk_idx: &topk_idx, topk_weights: &[0.5; TOKENS * TOPK] };
    let shape = RowShape { hidden: HIDDEN, topk: TOPK, format: RowFormat::Bf16 };

    // Forward: plan, dispatch, experts, combine.
    let handle = comm.plan(routing)?;
    let rows = handle.num_recv_tokens();
    let buffer = comm.recv_buffer(rows, shape)?;
    let mut received = comm.dispatch(&handle, vec![bf16::from_f32(4.0); TOKENS * HIDDEN], buffer)?.buffer;
    let experts = comm.config().placement().experts_of(comm.rank()).len();
    run_experts(&mut received, experts);
    let output = comm.combine(&handle, Combine::new(received))?.x;

    // Backward of combine: the gradient of the output goes where the tokens went (a cached dispatch).
    let gradient = vec![bf16::ONE; TOKENS * HIDDEN];
    let buffer = comm.recv_buffer(rows, shape)?;
    let mut gradients = comm.dispatch(&handle, gradient, buffer)?.buffer;
    run_experts(&mut gradients, experts);
    // Backward of dispatch: the gradients of the received rows come home and are summed.
    let gradient = comm.combine(&handle, Combine::new(gradients))?.x;

    // The experts are linear, so the output is the input times the gradient.
    assert!(output.iter().zip(&gradient).all(|(y, g)| y.to_f32() == 4.0 * g.to_f32()));
    Ok(format!(
        "rank {}: {rows} rows received, output[0] = {}, gradient[0] = {}",
        comm.rank(),
        output[0],
        gradient[0]
    ))
}

/// Experts that scale each row by their weight and a constant: grouped by expert as a grouped GEMM takes them,
/// and back.
fn run_experts(received: &mut railhop::RecvBuffer, experts: usize) {
    let order = ExpertMajor::new(received.topk_idx(), TOPK, experts, 16).expect("indices are local");
    let mut expanded = vec![bf16::ZERO; order.rows() * HIDDEN];
    order.expand(received.bf16(), HIDDEN, &mut expanded).expect("sizes match");
    expanded.iter_mut().for_each(|x| *x = bf16::from_f32(GAIN * x.to_f32()));
    let weights = received.topk_weights().to_vec();
    order.reduce(&expanded, HIDDEN, Some(&weights), received.bf16_mut()).expect("sizes match");
}
