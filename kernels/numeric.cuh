// Arithmetic on elements, bit for bit that of src/numeric: BF16, E4M3 codes, scales of groups.
#pragma once
#include "ptx.cuh"

namespace railhop {

/// What every NaN that leaves the arithmetic here becomes.
constexpr u32 NAN_F32 = 0x7FC00000;
constexpr u32 NAN_BF16 = 0x7FC0;

/// Bits of a magnitude from which on it is not finite.
constexpr u32 INF_BF16 = 0x7F80;

/// The largest E4M3 value.
constexpr float MAX_E4M3 = 448.0f;
/// The least magnitude a scale is fitted to: keeps the gain of an all-zero group finite.
constexpr float FLOOR_PEAK = 1e-4f;

// ---- BF16

/// The value of the low 16 bits.
DEV float widen_bf16(u32 bits) { return ptx::mov_f32(bits << 16); }
/// The value of the high 16 bits.
DEV float widen_high_bf16(u32 bits) { return ptx::mov_f32(bits & 0xFFFF0000); }

/// Two elements, the first in the low 16 bits: nearest even, overflowing to infinity; every NaN becomes 0x7FC0.
DEV u32 pack_bf16(float first, float second) {
    u32 pair = ptx::cvt_rn_bf16x2(second, first);
    if (first != first) pair = (pair & 0xFFFF0000) | NAN_BF16;
    if (second != second) pair = (pair & 0xFFFF) | NAN_BF16 << 16;
    return pair;
}

// ---- scales

/// A group's scale, and the gain that takes its elements to E4M3's range.
struct Fit {
    float scale;
    float gain;
};

/// The magnitude that a scale is fitted to. Magnitudes compare as their bits do.
DEV float fitted_peak(u32 peak) {
    const u32 bits = peak << 16, least = ptx::mov_b32(FLOOR_PEAK);
    return ptx::mov_f32(bits > least ? bits : least);
}

/// The f32 scale of a group whose largest finite element is `peak` (BF16 bits, no sign).
DEV Fit fit_f32(u32 peak) {
    const float a = fitted_peak(peak);
    return Fit{ptx::div_rn(a, MAX_E4M3), ptx::div_rn(MAX_E4M3, a)};
}

/// The same, rounded up to a power of two; as UE8M0 it is the exponent of `scale`.
DEV Fit fit_ue8m0(u32 peak) {
    const u32 scale = ptx::mov_b32(ptx::div_rn(fitted_peak(peak), MAX_E4M3));
    // Any mantissa bit carries into the exponent, which stays in 105..=247: the inverse is normal and exact.
    const u32 exponent = (scale + 0x7FFFFF) >> 23;
    return Fit{ptx::mov_f32(exponent << 23), ptx::mov_f32((254 - exponent) << 23)};
}

/// The bits of a UE8M0 scale as f32: two codes have no normal exponent.
DEV u32 widen_ue8m0(u32 code) {
    if (code == 0) return 1u << 22;
    return code == 0xFF ? NAN_F32 : code << 23;
}

/// Scale `group` of a row of scales of `scale_bytes` bytes each: 4 for f32, 1 for UE8M0.
DEV float read_scale(const u8* scales, u32 group, u32 scale_bytes) {
    if (scale_bytes == 4) return reinterpret_cast<const float*>(scales)[group];
    return ptx::mov_f32(widen_ue8m0(scales[group]));
}

// ---- E4M3

/// The bits of a magnitude, 0 if it is not finite.
DEV u32 finite_magnitude(u32 bits) {
    const u32 magnitude = bits & 0x7FFF;
    return magnitude < INF_BF16 ? magnitude : 0;
}

DEV u32 finite_peak_of_two(u32 two) {
    const u32 low = finite_magnitude(two), high = finite_magnitude(two >> 16);
    return low > high ? low : high;
}

/// Bits of the largest finite magnitude among eight BF16 elements; 0 if none is finite.
DEV u32 finite_peak(V4 eight) {
    const u32 x = finite_peak_of_two(eight.x), y = finite_peak_of_two(eight.y);
    const u32 z = finite_peak_of_two(eight.z), w = finite_peak_of_two(eight.w);
    const u32 low = x > y ? x : y, high = z > w ? z : w;
    return low > high ? low : high;
}

/// The codes of two BF16 elements, the first in the low byte.
DEV u32 encode2(u32 two, float gain) {
    const float first = ptx::mul_rn(widen_bf16(two), gain), second = ptx::mul_rn(widen_high_bf16(two), gain);
    return ptx::cvt_rn_satfinite_e4m3x2(second, first);
}

/// The codes of eight BF16 elements in order, the first in the lowest byte: saturating at ±448, NaN is 0x7F, zeros
/// keep their sign.
DEV u64 encode8(V4 eight, float gain) {
    const u32 low = encode2(eight.x, gain) | encode2(eight.y, gain) << 16;
    const u32 high = encode2(eight.z, gain) | encode2(eight.w, gain) << 16;
    return (u64)high << 32 | low;
}

/// The value of a code, exactly; both NaN codes give the same NaN.
DEV float decode_e4m3(u32 code) {
    const u32 magnitude = code & 0x7F;
    if (magnitude == 0x7F) return ptx::mov_f32(NAN_F32);
    // With its bits moved to those of an f32, which keeps denormals denormal, a code is worth 2^-120 of its value: the
    // biases of the exponents are 7 and 127.
    const float value = ptx::mov_f32(magnitude << 20 | (code & 0x80) << 24);
    return ptx::mul_rn(value, ptx::mov_f32((127 + 120) << 23));
}

/// `decode_e4m3(code) * scale`, rounded once; every NaN is 0x7FC00000.
DEV float dequantised(u32 code, float scale) {
    const float value = ptx::mul_rn(decode_e4m3(code), scale);
    return value != value ? ptx::mov_f32(NAN_F32) : value;
}

}  // namespace railhop
