//! The port of the host engine: roles touch mapped regions and the caller's buffers directly.

#![allow(unsafe_code)]

use std::sync::atomic::Ordering;

use half::bf16;

use super::World;
use crate::fabric::memory::deliver;
use crate::proto::{Input, Port, ScaleView};

/// The caller's buffers of one operation, as raw parts: the run that holds this also owns the buffers, and
/// keeps them until no task is left.
#[derive(Debug, Clone, Copy)]
pub struct CallerBuffers {
    input: RawInput,
    out: *mut bf16,
    out_len: usize,
    out_weights: *mut f32,
    out_weights_len: usize,
}

#[derive(Debug, Clone, Copy)]
enum RawInput {
    None,
    Bf16(*const [bf16]),
    E4m3(*const [u8], *const [u8], usize, usize),
}

// SAFETY: inputs are only read, and outputs are written by one task per token (`Port::emit`).
unsafe impl Send for CallerBuffers {}
// SAFETY: as above.
unsafe impl Sync for CallerBuffers {}

impl CallerBuffers {
    /// The parts of `input`, and the outputs of a combine.
    ///
    /// # Safety
    /// All slices stay where they are, `input` unchanged and the outputs untouched, until the run that holds
    /// the result has no task left.
    pub unsafe fn new(input: Input<'_>, out: &mut [bf16], out_weights: &mut [f32]) -> Self {
        let input = match input {
            Input::None => RawInput::None,
            Input::Bf16(x) => RawInput::Bf16(x),
            Input::E4m3(x, scales) => {
                RawInput::E4m3(x, scales.bytes, scales.token_stride, scales.group_stride)
            }
        };
        let (out_len, out_weights_len) = (out.len(), out_weights.len());
        Self { input, out: out.as_mut_ptr(), out_len, out_weights: out_weights.as_mut_ptr(), out_weights_len }
    }
}

/// What one operation's tasks touch.
pub struct HostPort<'a> {
    pub(super) world: &'a World,
    pub(super) rank: usize,
    pub(super) buffers: &'a CallerBuffers,
}

impl Port for HostPort<'_> {
    fn load(&self, word: usize) -> u64 {
        self.world.regions[self.rank].word(word).load(Ordering::Acquire)
    }

    fn set(&self, word: usize, value: u64) {
        // Private words are handed from task to task by the engine's locks.
        self.world.regions[self.rank].word(word).store(value, Ordering::Relaxed);
    }

    fn signal(&self, rank: usize, word: usize, value: u64) {
        self.world.fabric.signal(self.rank, rank, word, value);
    }

    fn put(&self, rank: usize, offset: usize, parts: &[&[u8]]) {
        self.world.fabric.put(self.rank, rank, offset, parts);
    }

    fn store(&self, rank: usize, offset: usize, bytes: &[u8]) {
        // SAFETY: after a good verdict every final row of a buffer has exactly one writer, the forwarder it
        // came through, and nobody reads the buffer before all writers are done (E5); records have one
        // writer, and their last reader has completed the operation before last. Every role signals after it
        // has stored, and `Fabric::signal` publishes with the fence.
        unsafe { deliver(self.world.regions[rank].slice_mut(offset, bytes.len()), bytes) }
    }

    fn own(&self, offset: usize, len: usize) -> &[u8] {
        // SAFETY: roles read records and slots after an index word that publishes them, and the writer does
        // not touch them again before a word that this rank publishes after the read.
        unsafe { self.world.regions[self.rank].slice(offset, len) }
    }

    fn peer(&self, rank: usize, offset: usize, len: usize) -> &[u8] {
        // SAFETY: as `own`; expert outputs belong to the operation until every reader is done (E5).
        unsafe { self.world.regions[rank].slice(offset, len) }
    }

    fn input(&self) -> Input<'_> {
        // SAFETY: `CallerBuffers::new`'s contract.
        unsafe {
            match self.buffers.input {
                RawInput::None => Input::None,
                RawInput::Bf16(x) => Input::Bf16(&*x),
                RawInput::E4m3(x, scales, token_stride, group_stride) => {
                    Input::E4m3(&*x, ScaleView { bytes: &*scales, token_stride, group_stride })
                }
            }
        }
    }

    fn emit(&self, token: usize, row: &[bf16], weights: &[f32]) {
        let b = self.buffers;
        assert!((token + 1) * row.len() <= b.out_len && (token + 1) * weights.len() <= b.out_weights_len);
        // SAFETY: in bounds; a token is delivered once, by the channel that owns it, so no other task has
        // its row; the buffers are the run's (`CallerBuffers::new`). The role's last signal of the operation
        // comes after, and the caller reads only when the run is over.
        unsafe {
            let out = std::slice::from_raw_parts_mut(b.out.add(token * row.len()), row.len());
            deliver(bytemuck::cast_slice_mut(out), bytemuck::cast_slice(row));
            std::slice::from_raw_parts_mut(b.out_weights.add(token * weights.len()), weights.len())
                .copy_from_slice(weights);
        }
    }
}
