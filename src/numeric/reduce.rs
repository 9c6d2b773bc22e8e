//! The sum of a token's rows, in f32 and in a fixed order.
#![allow(unsafe_code)] // The call of code compiled for AVX2, once detected.

use half::bf16;

/// What a token's result is summed from: rows of one length, each in the order in which it is added.
///
/// ```text
/// total = +0.0
/// total += p                     for p in before
/// total += (+0.0 + r0 + r1 ...)  the rows of own, unless there are none
/// total += p                     for p in after
/// total += bias                  if there is one
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Reduction<'a> {
    /// Partial sums of the nodes before the own node.
    pub before: &'a [&'a [bf16]],
    /// Rows of the own node, summed on their own as the other nodes summed theirs.
    pub own: &'a [&'a [bf16]],
    /// Partial sums of the nodes after the own node.
    pub after: &'a [&'a [bf16]],
    /// Added last.
    pub bias: Option<&'a [bf16]>,
}

/// Sums one token into `out`, rounding to bf16 once, by [`round_bf16`].
///
/// # Panics
/// If a row differs from `out` in length.
pub fn reduce(r: &Reduction, out: &mut [bf16]) {
    let rows = r.before.iter().chain(r.own).chain(r.after).copied().chain(r.bias);
    rows.for_each(|row| assert_eq!(row.len(), out.len(), "every row is as long as the result"));
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has the feature the callee is compiled for, its only requirement.
        return unsafe { avx2::reduce(r, out) };
    }
    reduce_portable(r, out);
}

fn reduce_portable(r: &Reduction, out: &mut [bf16]) {
    let (blocks, rest) = out.as_chunks_mut::<32>();
    for (i, block) in blocks.iter_mut().enumerate() {
        *block = sum(r, i * 32);
    }
    let at = blocks.len() * 32;
    for (i, out) in rest.iter_mut().enumerate() {
        [*out] = sum(r, at + i);
    }
}

/// The results `at..at + N`: all rows' elements there are added before the next ones are looked at, so that every row
/// is read once and no sum leaves the core.
#[inline(always)]
fn sum<const N: usize>(r: &Reduction, at: usize) -> [bf16; N] {
    let add = |mut sum: [f32; N], row: &&[bf16]| {
        for (sum, &x) in sum.iter_mut().zip(&row[at..at + N]) {
            *sum += bf16_to_f32(x);
        }
        sum
    };
    let mut total = r.before.iter().fold([0.0; N], add);
    if !r.own.is_empty() {
        let part = r.own.iter().fold([0.0; N], add);
        for (total, part) in total.iter_mut().zip(part) {
            *total += part;
        }
    }
    total = r.after.iter().fold(total, add);
    total = r.bias.iter().fold(total, add);
    let mut out = [bf16::ZERO; N];
    for (out, total) in out.iter_mut().zip(total) {
        *out = round_bf16(total);
    }
    out
}

/// The value of `x`, exactly, NaN payload included.
#[inline(always)]
pub fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Rounds to nearest, ties to even, overflowing to infinity; every NaN becomes `0x7FC0`.
#[inline(always)]
pub fn round_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if x.is_nan() { 0x7FC0 } else { rounded as u16 })
}

/// [`reduce_portable`]'s operations on the same operands, so the same bits. Left to the compiler it sums three
/// rows a fifth slower from memory, and much slower from cache.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{Reduction, sum};
    use bytemuck::must_cast;
    use half::bf16;
    use std::arch::x86_64::*;

    /// Elements of a block: two cache lines of every row, and as many sums as leave registers for their operands.
    const BLOCK: usize = 64;

    /// A block's sums: for every 16 elements those of the even and those of the odd ones, which takes a shift and a
    /// mask to widen.
    type Sums = [[__m256; 2]; BLOCK / 16];

    #[target_feature(enable = "avx2")]
    pub fn reduce(r: &Reduction, out: &mut [bf16]) {
        let zero: Sums = [[_mm256_setzero_ps(); 2]; BLOCK / 16];
        let (blocks, rest) = out.as_chunks_mut::<BLOCK>();
        for (i, out) in blocks.iter_mut().enumerate() {
            let at = i * BLOCK;
            let mut total = zero;
            for row in r.before {
                add(&mut total, row, at);
            }
            if !r.own.is_empty() {
                let mut part = zero;
                for row in r.own {
                    add(&mut part, row, at);
                }
                for (total, part) in total.as_flattened_mut().iter_mut().zip(part.as_flattened()) {
                    *total = _mm256_add_ps(*total, *part);
                }
            }
            for row in r.after {
                add(&mut total, row, at);
            }
            if let Some(bias) = r.bias {
                add(&mut total, bias, at);
            }
            for (out, [even, odd]) in out.as_chunks_mut::<16>().0.iter_mut().zip(total) {
                let even = _mm256_srli_epi32::<16>(round(even));
                *out = must_cast(_mm256_blend_epi16::<0b10101010>(even, round(odd)));
            }
        }
        let at = blocks.len() * BLOCK;
        for (i, out) in rest.iter_mut().enumerate() {
            [*out] = sum(r, at + i);
        }
    }

    /// Adds the block of `row` that starts at `at`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn add(sums: &mut Sums, row: &[bf16], at: usize) {
        for ([even, odd], &x) in sums.iter_mut().zip(row[at..at + BLOCK].as_chunks::<16>().0) {
            let x: __m256i = must_cast(x);
            let upper = _mm256_set1_epi32(0xFFFF_0000_u32 as i32);
            *even = _mm256_add_ps(*even, _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)));
            *odd = _mm256_add_ps(*odd, _mm256_castsi256_ps(_mm256_and_si256(x, upper)));
        }
    }

    /// [`super::round_bf16`], in the upper 16 bits of every lane; the lower are left over.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn round(x: __m256) -> __m256i {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x);
        _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0_0000), _mm256_castps_si256(nan))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One element, by the formula in the docs of [`Reduction`], with half's conversions.
    fn reference(r: &Reduction, i: usize) -> u16 {
        let mut total = 0.0f32;
        for p in r.before {
            total += p[i].to_f32();
        }
        if !r.own.is_empty() {
            let mut part = 0.0f32;
            for x in r.own {
                part += x[i].to_f32();
            }
            total += part;
        }
        for p in r.after {
            total += p[i].to_f32();
        }
        if let Some(bias) = r.bias {
            total += bias[i].to_f32();
        }
        if total.is_nan() { 0x7FC0 } else { bf16::from_f32(total).to_bits() }
    }

    fn check(r: &Reduction, len: usize) {
        let expected: Vec<u16> = (0..len).map(|i| reference(r, i)).collect();
        for reduce in [reduce as fn(&Reduction, &mut [bf16]), reduce_portable] {
            let mut out = vec![bf16::ONE; len];
            reduce(r, &mut out);
            assert_eq!(out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn rounds_as_half_but_for_nan() {
        // Every upper half, with the lower halves around a tie.
        for bits in (0..=u16::MAX)
            .flat_map(|hi| [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].map(|lo| u32::from(hi) << 16 | lo))
        {
            let x = f32::from_bits(bits);
            let expected = if x.is_nan() { 0x7FC0 } else { bf16::from_f32(x).to_bits() };
            assert_eq!(round_bf16(x).to_bits(), expected, "{bits:#x}");
        }
    }

    #[test]
    fn nothing_sums_to_zero() {
        let (zeros, sum) =
            ([bf16::NEG_ZERO; 40], Reduction { before: &[], own: &[], after: &[], bias: None });
        check(&sum, 40);
        check(&Reduction { own: &[&zeros], ..sum }, 40); // +0.0: sums start there
        check(&Reduction { before: &[&zeros], bias: Some(&zeros), ..sum }, 40);
    }

    #[test]
    #[should_panic(expected = "every row is as long")]
    fn rejects_a_long_row() {
        let row = [bf16::ONE; 9];
        reduce(&Reduction { before: &[], own: &[&row], after: &[], bias: None }, &mut [bf16::ZERO; 8]);
    }

    proptest! {
        #[test]
        fn sums_as_written(
            rows in (0usize..200).prop_flat_map(|n| prop::collection::vec(prop::collection::vec(element(), n), 1..14)),
            cuts in any::<[prop::sample::Index; 2]>(),
            bias in any::<bool>(),
        ) {
            let rows: Vec<&[bf16]> = rows.iter().map(|row| &row[..]).collect();
            let (last, rest) = rows.split_last().unwrap();
            let mut cuts = cuts.map(|cut| cut.index(rest.len() + 1));
            cuts.sort();
            let [from, to] = cuts;
            let (before, own, after) = (&rest[..from], &rest[from..to], &rest[to..]);
            check(&Reduction { before, own, after, bias: bias.then_some(last) }, last.len());
        }
    }

    /// Values that round when summed, and now and then any bf16: infinities, NaNs, denormals.
    fn element() -> impl Strategy<Value = bf16> {
        prop_oneof![
            20 => (-4.0f32..4.0).prop_map(bf16::from_f32),
            1 => any::<u16>().prop_map(bf16::from_bits),
        ]
    }
}
