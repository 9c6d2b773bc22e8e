//! Rows as FP8: OCP E4M3 codes with one scale for every [`GROUP`] consecutive elements.
//!
//! For a group of bf16 elements `x`, in f32, each operation rounded on its own:
//!
//! ```text
//! a = max(1e-4, largest finite |x|)      s = a / 448
//! F32:    code = e4m3(x * (448 / a))                                    scale = s
//! UE8M0:  s is rounded up to a power of two, code = e4m3(x * (1 / s))   scale = 127 + log2(s)
//! ```
//!
//! `e4m3` rounds to nearest even and saturates at ±448, so ±Inf becomes ±448; every NaN becomes `0x7F`; zeros
//! keep their sign.
#![allow(unsafe_code)] // The call of code compiled for AVX2, once detected.

use half::bf16;

/// Elements that share a scale. The last group of a row may be shorter.
pub const GROUP: usize = 128;

/// The largest E4M3 value.
const MAX: f32 = 448.0;
/// The least magnitude a scale is fitted to: keeps the gain of an all-zero group finite.
const FLOOR: f32 = 1e-4;
/// The only positive E4M3 NaN, and the code of every NaN element.
const NAN: u8 = 0x7F;
/// bf16 bits of +Inf; magnitudes above it are NaN.
const INF: u16 = 0x7F80;

/// How a group's scale is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleFormat {
    /// Little-endian f32, 4 bytes.
    F32,
    /// A power of two as its biased f32 exponent, 1 byte (OCP E8M0).
    Ue8m0,
}

impl ScaleFormat {
    /// Bytes of one stored scale.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Ue8m0 => 1,
        }
    }

    /// The scale of group `group`, of a row whose stored scales start at `scales[0]`.
    ///
    /// # Panics
    /// If `scales` ends before that group's scale.
    #[inline]
    pub fn read(self, scales: &[u8], group: usize) -> f32 {
        match self {
            Self::F32 => f32::from_le_bytes(scales.as_chunks().0[group]),
            // The two codes without a normal exponent: 2^-127 is a denormal f32, 255 is NaN.
            Self::Ue8m0 => f32::from_bits(match scales[group] {
                0 => 1 << 22,
                0xFF => f32::NAN.to_bits(),
                exponent => u32::from(exponent) << 23,
            }),
        }
    }

    #[inline(always)]
    fn write(self, scale: f32, bytes: &mut [u8]) {
        match self {
            Self::F32 => bytes.copy_from_slice(&scale.to_le_bytes()),
            Self::Ue8m0 => bytes[0] = (scale.to_bits() >> 23) as u8,
        }
    }

    /// The scale of a group whose largest finite element is `peak` (bf16 bits, no sign), and the gain that
    /// takes its elements to E4M3's range.
    #[inline(always)]
    fn fit(self, peak: u16) -> (f32, f32) {
        let a = widen(peak).max(FLOOR);
        let scale = a / MAX;
        match self {
            Self::F32 => (scale, MAX / a),
            Self::Ue8m0 => {
                // Any mantissa bit carries into the exponent. FLOOR and bf16's range keep it in 105..=247, so
                // the inverse 2^(127 - exponent) is normal and exact.
                let exponent = (scale.to_bits() + 0x7F_FFFF) >> 23;
                (f32::from_bits(exponent << 23), f32::from_bits((254 - exponent) << 23))
            }
        }
    }
}

/// Scales of a row of `hidden` elements.
pub const fn scale_groups(hidden: usize) -> usize {
    hidden.div_ceil(GROUP)
}

/// Quantises one row: `codes[i]` is the E4M3 code of `x[i]`, and the front of `scales` receives
/// `scale_groups(x.len()) * format.bytes()` bytes. Any further bytes of `scales` are left alone.
///
/// # Panics
/// If `codes` and `x` differ in length, or `scales` is too short.
pub fn quantise(x: &[bf16], format: ScaleFormat, codes: &mut [u8], scales: &mut [u8]) {
    assert_eq!(x.len(), codes.len(), "one code per element");
    let scales = &mut scales[..scale_groups(x.len()) * format.bytes()];
    #[cfg(target_arch = "x86_64")]
    if avx2::detected() {
        // SAFETY: the machine has the features the callee is compiled for, its only requirement.
        return unsafe { avx2::quantise(x, format, codes, scales) };
    }
    quantise_portable(x, format, codes, scales);
}

/// Dequantises one row: `out[i] = decode(codes[i]) * scale` of its group, rounded once.
///
/// # Panics
/// If `codes` and `out` differ in length, or `scales` holds fewer than `scale_groups(codes.len())` scales.
pub fn dequantise(codes: &[u8], format: ScaleFormat, scales: &[u8], out: &mut [f32]) {
    assert_eq!(codes.len(), out.len(), "one element per code");
    #[cfg(target_arch = "x86_64")]
    if avx2::detected() {
        // SAFETY: the machine has the features the callee is compiled for, its only requirement.
        return unsafe { avx2::dequantise(codes, format, scales, out) };
    }
    dequantise_portable(codes, format, scales, out);
}

/// The value of an E4M3 code, exactly. `0x7F` and `0xFF` are NaN.
#[inline]
pub fn decode(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7F);
    let value = match magnitude {
        0x7F => return f32::NAN,
        0..8 => magnitude as f32 * (1.0 / 512.0),
        _ => f32::from_bits((magnitude << 20) + ((127 - 7) << 23)),
    };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

fn quantise_portable(x: &[bf16], format: ScaleFormat, codes: &mut [u8], scales: &mut [u8]) {
    let groups = x.chunks(GROUP).zip(codes.chunks_mut(GROUP)).zip(scales.chunks_exact_mut(format.bytes()));
    for ((x, codes), scale) in groups {
        quantise_group(x, format, codes, scale);
    }
}

/// Quantises one group, of any elements and of any length.
fn quantise_group(x: &[bf16], format: ScaleFormat, codes: &mut [u8], scale: &mut [u8]) {
    let finite = |x: &bf16| Some(x.to_bits() & 0x7FFF).filter(|&magnitude| magnitude < INF);
    let (s, gain) = format.fit(x.iter().filter_map(finite).max().unwrap_or(0));
    format.write(s, scale);
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = encode(x, gain);
    }
}

fn dequantise_portable(codes: &[u8], format: ScaleFormat, scales: &[u8], out: &mut [f32]) {
    for (group, (codes, out)) in codes.chunks(GROUP).zip(out.chunks_mut(GROUP)).enumerate() {
        dequantise_group(codes, format.read(scales, group), out);
    }
}

fn dequantise_group(codes: &[u8], scale: f32, out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = decode(code) * scale;
    }
}

#[inline(always)]
fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

// E4M3 by one f32 addition. For y in [2^e, 2^(e+1)) E4M3 steps by 2^(e-3), and by 2^-9 below 2^-6 (its denormals).
// An f32 of exponent e + 20 has exactly that last place, so adding one rounds y to a whole number of E4M3 steps, ties
// to even, in the low bits of the sum: 8..=16 for normals, 0..=8 for denormals. The code adds 8 for every exponent
// above the denormals'; the addend's bits shifted to place supply it, all but a constant.

/// f32 exponent bits.
const EXPONENT: u32 = 0x7F80_0000;
/// Bits of 2^-6, the least normal E4M3 value.
const LEAST_NORMAL: u32 = (127 - 6) << 23;
/// What makes an exponent the addend: 20 more, and (even, so ties are unmoved) the constant that cancels the bias,
/// modulo 256, of the exponent in the code: `(127 - 6 + 20) * 8 + 0x98 = 0x500`.
const ADDEND: u32 = 20 << 23 | 0x98;

#[inline(always)]
fn encode(x: bf16, gain: f32) -> u8 {
    let magnitude = x.to_bits() & 0x7FFF;
    if magnitude > INF {
        return NAN;
    }
    let y = (widen(magnitude) * gain).min(MAX);
    let addend = (y.to_bits() & EXPONENT).max(LEAST_NORMAL) + ADDEND;
    let sum = (y + f32::from_bits(addend)).to_bits();
    let code = sum.wrapping_add(addend >> 20) as u8;
    code | (x.to_bits() >> 8) as u8 & 0x80
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::*;
    use bytemuck::must_cast;
    use half::bf16;
    use std::arch::x86_64::*;

    /// Whether this machine can run this module's functions.
    pub fn detected() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
    }

    #[target_feature(enable = "avx2")]
    pub fn quantise(x: &[bf16], format: ScaleFormat, codes: &mut [u8], scales: &mut [u8]) {
        let (groups, rest) = x.as_chunks::<GROUP>();
        let (group_codes, rest_codes) = codes.as_chunks_mut::<GROUP>();
        let mut scales = scales.chunks_exact_mut(format.bytes());

        // A group is fitted before the one ahead of it is encoded, which hides the latency of the division.
        let mut next = fit(groups.first(), format);
        for (g, ((group, codes), scale)) in groups.iter().zip(group_codes).zip(scales.by_ref()).enumerate() {
            let fitted = next;
            next = fit(groups.get(g + 1), format);
            if let Some((s, gain)) = fitted {
                format.write(s, scale);
                encode_finite(group, gain, codes);
            } else {
                quantise_group(group, format, codes, scale);
            }
        }
        if let Some(scale) = scales.next() {
            quantise_group(rest, format, rest_codes, scale);
        }
    }

    /// [`ScaleFormat::fit`] of a group whose elements are all finite; none otherwise.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn fit(group: Option<&[bf16; GROUP]>, format: ScaleFormat) -> Option<(f32, f32)> {
        let mut peak = _mm256_setzero_si256();
        for &x in group?.as_chunks::<16>().0 {
            peak = _mm256_max_epi16(peak, _mm256_and_si256(must_cast(x), _mm256_set1_epi16(0x7FFF)));
        }
        // There is a horizontal minimum of u16, so take that of the complement.
        let peak = _mm_max_epi16(_mm256_castsi256_si128(peak), _mm256_extracti128_si256::<1>(peak));
        let peak = !_mm_extract_epi16::<0>(_mm_minpos_epu16(_mm_xor_si128(peak, _mm_set1_epi16(-1)))) as u16;
        if peak < INF { Some(format.fit(peak)) } else { None }
    }

    /// [`encode`] for elements that are all finite: none needs `min(MAX)`, as `|x| * gain` is at most 448 before
    /// roundings that stay far below 464, from where codes above 448 would begin.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn encode_finite(group: &[bf16; GROUP], gain: f32, codes: &mut [u8; GROUP]) {
        let zero = _mm256_setzero_si256();
        let gain = _mm256_set1_ps(gain);
        // 8 magnitudes in f32 bits to 8 codes, each in an i32.
        let encode = |magnitude: __m256i| {
            let y = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), gain);
            let exponent = _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(EXPONENT as i32));
            let exponent = _mm256_max_epi32(exponent, _mm256_set1_epi32(LEAST_NORMAL as i32));
            let addend = _mm256_add_epi32(exponent, _mm256_set1_epi32(ADDEND as i32));
            let sum = _mm256_castps_si256(_mm256_add_ps(y, _mm256_castsi256_ps(addend)));
            let code = _mm256_add_epi32(sum, _mm256_srli_epi32::<20>(addend));
            _mm256_and_si256(code, _mm256_set1_epi32(0xFF))
        };
        // 16 elements to 16 codes, each in an i16. Unpacking and packing stay within 128-bit halves, and undo one another.
        let encode16 = |x: __m256i| {
            let magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7FFF));
            let low = encode(_mm256_unpacklo_epi16(zero, magnitude));
            let high = encode(_mm256_unpackhi_epi16(zero, magnitude));
            _mm256_packus_epi32(low, high)
        };
        for (x, codes) in group.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<32>().0) {
            let [x0, x1]: [__m256i; 2] = must_cast(*x);
            let code = _mm256_packus_epi16(encode16(x0), encode16(x1));
            // Saturating to i8 keeps the sign bit.
            let sign = _mm256_and_si256(_mm256_packs_epi16(x0, x1), _mm256_set1_epi8(i8::MIN));
            // The last packing interleaved the 128-bit halves of its operands.
            *codes = must_cast(_mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_or_si256(code, sign)));
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    pub fn dequantise(codes: &[u8], format: ScaleFormat, scales: &[u8], out: &mut [f32]) {
        let (groups, rest) = codes.as_chunks::<GROUP>();
        let (group_out, rest_out) = out.as_chunks_mut::<GROUP>();
        for (g, (codes, out)) in groups.iter().zip(group_out).enumerate() {
            decode_group(codes, format.read(scales, g), out);
        }
        if !rest.is_empty() {
            dequantise_group(rest, format.read(scales, groups.len()), rest_out);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn decode_group(codes: &[u8; GROUP], scale: f32, out: &mut [f32; GROUP]) {
        // A code with its bits moved to an f16's sign, exponent and mantissa is worth 2^-8 of its value: E4M3's
        // exponent bias is 7, f16's 15, and their denormals agree. Undoing that is exact; the scaling then rounds.
        let widen = |half: __m128i| {
            let value = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0));
            _mm256_mul_ps(value, _mm256_set1_ps(scale))
        };
        for (&codes, out) in codes.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<16>().0) {
            let code = _mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(must_cast(codes)));
            // The arithmetic shift leaves a copy of the sign in the exponent's top bit, which the mask clears.
            let half = _mm256_and_si256(_mm256_srai_epi16::<1>(code), _mm256_set1_epi16(0xBF80_u16 as i16));
            let magnitude = _mm256_and_si256(code, _mm256_set1_epi16(0x7FFF));
            let nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(i16::from(NAN) << 8));
            let half = _mm256_blendv_epi8(half, _mm256_set1_epi16(0x7E00), nan);
            *out =
                must_cast([widen(_mm256_castsi256_si128(half)), widen(_mm256_extracti128_si256::<1>(half))]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use float8::F8E4M3;
    use proptest::prelude::*;

    const FORMATS: [ScaleFormat; 2] = [ScaleFormat::F32, ScaleFormat::Ue8m0];

    /// The module's formulas, as written, on float8's E4M3 (saturating, but keeping the sign of NaN).
    fn reference(x: &[bf16], format: ScaleFormat) -> (Vec<u8>, Vec<u8>) {
        let (mut codes, mut scales) = (vec![], vec![]);
        for group in x.chunks(GROUP) {
            let x = group.iter().map(|x| x.to_f32());
            let a = x.clone().filter(|x| x.is_finite()).fold(1e-4f32, |a, x| a.max(x.abs()));
            let gain = match format {
                ScaleFormat::F32 => {
                    scales.extend((a / 448.0).to_le_bytes());
                    448.0 / a
                }
                ScaleFormat::Ue8m0 => {
                    let s = (-127..=127).find(|&k| 2f64.powi(k) >= f64::from(a / 448.0)).unwrap();
                    scales.push((127 + s) as u8);
                    2f32.powi(-s)
                }
            };
            codes.extend(x.map(|x| if x.is_nan() { 0x7F } else { F8E4M3::from_f32(x * gain).to_bits() }));
        }
        (codes, scales)
    }

    /// Both paths against the reference, then back, both paths against its formula.
    fn check(x: &[bf16]) {
        type Quantise = fn(&[bf16], ScaleFormat, &mut [u8], &mut [u8]);
        type Dequantise = fn(&[u8], ScaleFormat, &[u8], &mut [f32]);
        for format in FORMATS {
            let (codes, scales) = reference(x, format);
            for quantise in [quantise as Quantise, quantise_portable] {
                let (mut c, mut s) = (vec![0; x.len()], vec![0; scales.len()]);
                quantise(x, format, &mut c, &mut s);
                assert_eq!((&c, &s), (&codes, &scales), "{format:?} {x:?}");
            }
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let back: Vec<f32> = codes
                .iter()
                .enumerate()
                .map(|(i, &c)| F8E4M3::from_bits(c).to_f32() * format.read(&scales, i / GROUP))
                .map(|x| if x.is_nan() { f32::NAN } else { x })
                .collect();
            for dequantise in [dequantise as Dequantise, dequantise_portable] {
                let mut out = vec![0.0; x.len()];
                dequantise(&codes, format, &scales, &mut out);
                assert_eq!(bits(&out), bits(&back), "{format:?}");
            }
        }
    }

    #[test]
    fn decodes_every_code() {
        for code in 0..=255 {
            let (value, expected) = (decode(code), F8E4M3::from_bits(code).to_f32());
            assert!(
                value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan(),
                "{code:#x}"
            );
        }
    }

    #[test]
    fn dequantises_every_code_alike() {
        let codes: Vec<u8> = (0..=255).collect();
        for scale in [1.0f32, 0.1, f32::MAX, 1e-42, f32::INFINITY] {
            let scales: Vec<u8> = [scale.to_le_bytes(); 2].concat();
            let (mut fast, mut portable) = (vec![0.0; 256], vec![0.0; 256]);
            dequantise(&codes, ScaleFormat::F32, &scales, &mut fast);
            dequantise_portable(&codes, ScaleFormat::F32, &scales, &mut portable);
            for (fast, portable) in fast.iter().zip(&portable) {
                assert!(fast.to_bits() == portable.to_bits() || fast.is_nan() && portable.is_nan());
            }
        }
    }

    /// Every bf16, among neighbours (scales that suit it) and among strangers (elements far below the peak).
    #[test]
    fn quantises_every_bf16() {
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        check(&all);
        let spread: Vec<bf16> = (0..=u16::MAX).map(|i| bf16::from_bits(i.wrapping_mul(0x9E37))).collect();
        check(&spread);
        // Groups of one sign and exponent, with the peak stepping through its neighbourhood.
        for peak in (0x3800..0x4400).step_by(37) {
            let row: Vec<bf16> = (0..4 * GROUP as u16).map(|i| bf16::from_bits(peak - i)).collect();
            check(&row);
        }
    }

    #[test]
    fn edge_values() {
        let row =
            [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, -1e-40].map(bf16::from_f32);
        for format in FORMATS {
            let (mut codes, mut scales) = ([0; 7], [0xAA; 9]);
            quantise(&row, format, &mut codes, &mut scales);
            assert_eq!(codes, [0x7F, 0x7F, 0x7E, 0xFE, 0x00, 0x80, 0x80]);
            assert!(scales[format.bytes()..].iter().all(|&b| b == 0xAA), "padding untouched");
        }
        // A scale that is a power of two already stays: 448 / 448 = 1.
        let (mut codes, mut scales) = ([0], [0]);
        quantise(&[bf16::from_f32(448.0)], ScaleFormat::Ue8m0, &mut codes, &mut scales);
        assert_eq!((codes, scales), ([0x7E], [127]));
        quantise(&[bf16::from_f32(450.0)], ScaleFormat::Ue8m0, &mut codes, &mut scales);
        assert_eq!((codes, scales), ([0x76], [128]));
    }

    proptest! {
        #[test]
        fn quantises_rows(row in (1usize..=25).prop_flat_map(|n| prop::collection::vec(element(), n * 16))) {
            check(&row);
        }

        #[test]
        fn quantises_any_length(row in prop::collection::vec(element(), 0..300)) {
            check(&row);
        }
    }

    /// Mostly activations, so that whole groups are finite, and now and then any bf16 at all.
    fn element() -> impl Strategy<Value = bf16> {
        prop_oneof![
            300 => (-4.0f32..4.0).prop_map(bf16::from_f32),
            100 => (0u16..0x80).prop_map(bf16::from_bits),
            2 => any::<u16>().prop_map(bf16::from_bits),
            1 => prop::sample::select(vec![0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81]).prop_map(bf16::from_bits),
        ]
    }
}
