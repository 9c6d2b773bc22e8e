//! Memory of the host, for kernels.

#![allow(dead_code, reason = "every test file takes what it needs")]

use bytemuck::{Pod, Zeroable, pod_read_unaligned};

/// Memory of a rank, where it stays until it is dropped.
pub struct Memory {
    lines: Vec<Line>,
}

/// As aligned as device memory.
#[repr(C, align(128))]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Line([u8; 128]);

impl Memory {
    /// Zeroed memory.
    pub fn new(bytes: usize) -> Self {
        Self { lines: vec![Line::zeroed(); bytes.div_ceil(128).max(1)] }
    }

    pub fn of<T: Pod>(values: &[T]) -> Self {
        let mut memory = Self::new(size_of_val(values));
        memory.bytes_mut()[..size_of_val(values)].copy_from_slice(bytemuck::cast_slice(values));
        memory
    }

    pub fn address(&self) -> u64 {
        self.lines.as_ptr() as u64
    }

    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.lines)
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }

    /// The value at an offset.
    pub fn read<T: Pod>(&self, at: usize) -> T {
        pod_read_unaligned(&self.bytes()[at..at + size_of::<T>()])
    }

    /// `len` values from an offset on.
    pub fn slice<T: Pod>(&self, at: usize, len: usize) -> Vec<T> {
        bytemuck::pod_collect_to_vec(&self.bytes()[at..at + len * size_of::<T>()])
    }

    pub fn write<T: Pod>(&mut self, at: usize, values: &[T]) {
        self.bytes_mut()[at..at + size_of_val(values)].copy_from_slice(bytemuck::cast_slice(values));
    }
}
