//! The parameters of the kernels that work on one rank's rows alone. Numbers of rows are read on the device, so
//! that nothing waits for the host to know them; what is allocated bounds them.
//!
//! Letters in shapes: R received rows, K entries of a row's top-k, H elements of a row, E experts of the rank,
//! G scales of a row.

use super::render::{device_codes, device_struct};

/// Threads of the block that makes an order, at most.
pub const ORDER_THREADS: usize = 512;

/// The most that received entries and the padding of all experts may come to: orders count in 32 bits.
pub const MAX_ENTRIES: usize = i32::MAX as usize;

/// Words of scratch that an order of `num_experts` experts takes.
pub const fn order_scratch_words(num_experts: usize) -> usize {
    ORDER_THREADS / 32 * num_experts
}

/// Expanded rows that `capacity` received rows may come to: always enough for an order. More than
/// [`MAX_ENTRIES`] cannot be ordered.
pub const fn most_expanded_rows(capacity: usize, topk: usize, num_experts: usize, alignment: usize) -> usize {
    let entries = capacity.saturating_mul(topk);
    entries.saturating_add(num_experts.saturating_mul(alignment.saturating_sub(1)))
}

device_codes! {
    /// How the making of an order ended.
    order {
        /// It can be used.
        OK = 1,
        /// More rows were received than `topk_idx` has.
        TOO_MANY_RECEIVED = 2,
        /// An entry of `topk_idx` is neither an expert of this rank nor −1.
        EXPERT_OUT_OF_RANGE = 3,
        /// More expanded rows than there is room for: the end of the last expert's rows says how many.
        TOO_MANY_ROWS = 4,
    }
}

device_codes! {
    /// What expanded scales are.
    columns {
        /// Not there.
        NONE = 0,
        /// f32 as received, f32 [G, column pitch].
        F32 = 1,
        /// UE8M0 widened to f32, f32 [G, column pitch].
        WIDENED = 2,
        /// UE8M0, four to a word, u32 [G / 4 rounded up, column pitch].
        PACKED = 3,
    }
}

device_struct! {
    /// An expert-major order, beside its tables. One that can't be used has no rows.
    ExpertOrder {
        /// See `order`.
        pub status: u32,
        /// Received rows.
        pub received: u32,
        /// Expanded rows, padding included.
        pub rows: u32,
        /// Keeps what follows aligned.
        pub reserved: u32,
        /// Lowest index of an entry of `topk_idx` that is no expert; all ones if there is none.
        pub invalid: u64,
    }
}

device_struct! {
    /// Makes an expert-major order. Entries that there is room for, capacity * K, and E * (alignment - 1) come to
    /// at most 2^31 - 1.
    ExpertOrderParams {
        /// i32 [capacity, K]: experts of this rank, or −1.
        pub topk_idx: u64,
        /// u64: received rows.
        pub received: u64,
        /// The order made: `ExpertOrder`.
        pub order: u64,
        /// `u32 [E]`: rows of each expert, padding excluded.
        pub counts: u64,
        /// u32 [E + 1]: where each expert's rows start, then where the last ones end.
        pub starts: u64,
        /// u32 [capacity, K]: the expanded row of every entry; all ones where there is none.
        pub expanded: u64,
        /// u32 [expanded capacity]: the received row of every expanded row; all ones for padding.
        pub sources: u64,
        /// u32 [warps, E], of no use afterwards.
        pub scratch: u64,
        /// Received rows that there is room for.
        pub capacity: u32,
        /// Expanded rows that there is room for.
        pub expanded_capacity: u32,
        /// K, at least 1.
        pub topk: u32,
        /// E.
        pub num_experts: u32,
        /// What each expert's number of rows is padded to a multiple of, at least 1.
        pub alignment: u32,
        /// Keeps the size a multiple of 8.
        pub reserved: u32,
    }
}

device_struct! {
    /// Expands received rows and their scales. Rows and rows of scales are multiples of 16 bytes, at such
    /// addresses.
    ExpandParams {
        /// `ExpertOrder`.
        pub order: u64,
        /// The received row of every expanded row.
        pub sources: u64,
        /// Received rows.
        pub x: u64,
        /// Expanded rows. Padding is zero; what lies after the last row is left alone.
        pub out: u64,
        /// Scales of received rows.
        pub scales: u64,
        /// Expanded scales, column-major. Those of padding rows and after the last row are zero.
        pub out_scales: u64,
        /// Bytes of a row.
        pub row_bytes: u32,
        /// Bytes from one received row's scales to the next's.
        pub scale_pitch: u32,
        /// Scales of a row.
        pub scale_groups: u32,
        /// Elements from column to column, at least the number of expanded rows.
        pub column_pitch: u32,
        /// See `columns`.
        pub columns: u32,
        /// Keeps the size a multiple of 8.
        pub reserved: u32,
    }
}

device_struct! {
    /// Reduces the experts' outputs to one row per received row.
    CollapseParams {
        /// `ExpertOrder`.
        pub order: u64,
        /// The expanded row of every entry.
        pub expanded: u64,
        /// BF16 [expanded rows, H], at an address that is a multiple of 16.
        pub y: u64,
        /// f32 [R, K]; 0 for none.
        pub weights: u64,
        /// BF16 [R, H], at an address that is a multiple of 16.
        pub out: u64,
        /// H, a multiple of 8.
        pub hidden: u32,
        /// K, at most 32.
        pub topk: u32,
    }
}

device_struct! {
    /// Dequantises received rows.
    DequantiseParams {
        /// E4M3 [R, H], at an address that is a multiple of 16.
        pub x: u64,
        /// Scales of the rows.
        pub scales: u64,
        /// f32 or BF16 [R, H], at an address that is a multiple of 16.
        pub out: u64,
        /// u64: received rows.
        pub received: u64,
        /// Rows that there is room for: no more are dequantised.
        pub capacity: u32,
        /// H, a multiple of 16.
        pub hidden: u32,
        /// Bytes from one row's scales to the next's, a multiple of a scale's.
        pub scale_pitch: u32,
        /// Bytes of a scale: 4 for f32, 1 for UE8M0.
        pub scale_bytes: u32,
        /// Bytes of an element of the result: 4 for f32, 2 for BF16.
        pub out_bytes: u32,
        /// Keeps the size a multiple of 8.
        pub reserved: u32,
    }
}

device_struct! {
    /// Copies bytes.
    CopyParams {
        /// Where they are, a multiple of 16.
        pub from: u64,
        /// Where they go, a multiple of 16; the two do not overlap.
        pub to: u64,
        /// How many, a multiple of 16.
        pub bytes: u64,
    }
}
