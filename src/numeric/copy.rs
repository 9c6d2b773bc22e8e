//! Bulk copies that bypass the cache.
#![allow(unsafe_code)] // Non-temporal stores.

/// Copies `src` to `dst`, with non-temporal stores where the machine has them: whole cache lines go to memory without
/// first being read and without displacing what is cached. For rows that this core does not read soon. Any length and
/// alignment is correct; a `dst` aligned to 64 bytes is fastest.
///
/// # Safety
/// Non-temporal stores are not ordered before later release operations: the calling thread must call [`fence`] after
/// this and before anything that lets another thread, process or device read `dst`.
///
/// # Panics
/// If `dst` and `src` differ in length.
#[inline]
pub unsafe fn stream(dst: &mut [u8], src: &[u8]) {
    assert_eq!(dst.len(), src.len(), "a copy is as long as its source");
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_loadu_si128, _mm_stream_si128};

        /// A cache line. Only whole ones are streamed: one left unfilled costs a read and several partial writes.
        #[repr(align(64))]
        struct Line([u8; 64]);

        // SAFETY: every byte pattern is a valid `Line`, and every `Line` is valid bytes.
        let (head, lines, tail) = unsafe { dst.align_to_mut::<Line>() };
        let (src_head, src) = src.split_at(head.len());
        let (src_lines, src_tail) = src.as_chunks::<64>();
        head.copy_from_slice(src_head);
        for (Line(line), src) in lines.iter_mut().zip(src_lines) {
            for (dst, src) in line.as_chunks_mut::<16>().0.iter_mut().zip(src.as_chunks::<16>().0) {
                // SAFETY: both point to 16 bytes, `dst` aligned to 16 as a quarter of a `Line`. SSE2 is part of
                // x86-64. The fence that must follow is the caller's to call.
                unsafe { _mm_stream_si128(dst.as_mut_ptr().cast(), _mm_loadu_si128(src.as_ptr().cast())) };
            }
        }
        tail.copy_from_slice(src_tail);
    }
    #[cfg(not(target_arch = "x86_64"))]
    dst.copy_from_slice(src);
}

/// Orders this thread's earlier [`stream`] copies before its later stores; with a release store after it, they are
/// visible to whoever acquires that store. Nothing to do, and free, where copies are ordinary stores.
#[inline]
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and the instruction touches no memory.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_every_alignment_and_length() {
        let src: Vec<u8> = (0..400).map(|i| (i * 7) as u8).collect();
        let mut dst = vec![0u8; 400];
        for (to, from, len) in
            (0..64).flat_map(|to| (0..17).flat_map(move |from| (0..=300).map(move |n| (to, from, n))))
        {
            dst.fill(0xAA);
            // SAFETY: fenced, and only this thread reads `dst`.
            unsafe { stream(&mut dst[to..to + len], &src[from..from + len]) };
            fence();
            assert_eq!(dst[to..to + len], src[from..from + len]);
            assert!(dst[..to].iter().chain(&dst[to + len..]).all(|&b| b == 0xAA), "{to} {from} {len}");
        }
    }
}
