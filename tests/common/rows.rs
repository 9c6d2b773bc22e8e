//! Small work for a device, whatever the driver: kernels of one rank, and what they need.

use std::sync::Arc;

use bytemuck::{Pod, bytes_of};
use railhop::device::{Driver, Grid, Kernel, Memory, Place, Stream};
use railhop::wire::local::{DequantiseParams, ExpertOrder, ExpertOrderParams};

pub const HIDDEN: usize = 128;
/// 1.0 in E4M3.
const ONE: u8 = 0x38;
pub const GRID: Grid = Grid { blocks: 2, warps: 2, shared: 0 };

/// Memory that holds values.
pub fn holding<T: Pod>(driver: &Arc<dyn Driver>, place: Place, values: &[T]) -> Memory {
    let memory = Memory::new(driver, place, size_of_val(values)).unwrap();
    let stream = Stream::new(driver).unwrap();
    // SAFETY: as many bytes on both sides, which nobody else knows.
    unsafe { stream.copy_now(memory.address(), values.as_ptr() as u64, size_of_val(values)).unwrap() };
    memory
}

/// Rows of ones, to be multiplied with a scale each.
pub struct Rows {
    pub rows: usize,
    received: Memory,
    x: Memory,
    pub out: Memory,
}

impl Rows {
    /// So many rows, whose products go to `place`.
    pub fn new(driver: &Arc<dyn Driver>, place: Place, rows: usize) -> Self {
        let received = holding(driver, Place::Device, &[rows as u64]);
        let x = holding(driver, Place::Device, &vec![ONE; rows * HIDDEN]);
        Self { rows, received, x, out: Memory::new(driver, place, 4 * rows * HIDDEN).unwrap() }
    }

    /// Multiplies each row with the f32 that stands at the start of a row of `scales`.
    pub fn params(&self, scales: u64, scale_pitch: usize) -> DequantiseParams {
        DequantiseParams {
            x: self.x.address(),
            scales,
            out: self.out.address(),
            received: self.received.address(),
            capacity: self.rows as u32,
            hidden: HIDDEN as u32,
            scale_pitch: scale_pitch as u32,
            scale_bytes: 4,
            out_bytes: 4,
            reserved: 0,
        }
    }

    pub fn launch(&self, driver: &dyn Driver, stream: &Stream, scales: u64, scale_pitch: usize) {
        let params = self.params(scales, scale_pitch);
        // SAFETY: what the kernel takes; the tests keep the memories until it has ended, or the machine is gone.
        unsafe { driver.launch(stream.raw(), Kernel::Dequantise, GRID, bytes_of(&params)).unwrap() }
    }
}

/// An order that the kernel makes where it must not: in memory of the host, by counting in the device's scope.
pub struct MisplacedOrder {
    words: Memory,
    no_expert: Memory,
    received: Memory,
    order: Memory,
}

impl MisplacedOrder {
    pub fn new(driver: &Arc<dyn Driver>) -> Self {
        Self {
            words: Memory::new(driver, Place::Device, 1 << 16).unwrap(),
            no_expert: holding(driver, Place::Device, &[77_i32]),
            received: holding(driver, Place::Device, &[1_u64]),
            order: Memory::new(driver, Place::Host, size_of::<ExpertOrder>()).unwrap(),
        }
    }

    pub fn launch(&self, driver: &dyn Driver, stream: &Stream) {
        let table = |i: u64| self.words.address() + (i << 12);
        let params = ExpertOrderParams {
            topk_idx: self.no_expert.address(),
            received: self.received.address(),
            order: self.order.address(),
            counts: table(1),
            starts: table(2),
            expanded: table(3),
            sources: table(4),
            scratch: table(5),
            capacity: 1,
            expanded_capacity: 16,
            topk: 1,
            num_experts: 4,
            alignment: 1,
            reserved: 0,
        };
        let grid = Grid { blocks: 1, warps: 1, shared: 0 };
        // SAFETY: what the kernel takes; the machine is gone before the memory is.
        unsafe { driver.launch(stream.raw(), Kernel::ExpertOrder, grid, bytes_of(&params)).unwrap() }
    }
}
