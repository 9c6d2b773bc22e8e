// kernels/numeric.cuh for the host: what tests compare with src/numeric.
#include "../../kernels/numeric.cuh"

using namespace railhop;

extern "C" {

/// Quantises one row of a multiple of 8 elements.
void quantise_row(const V4* x, u64 elements, u32 scale_bytes, u64* codes, u8* scales) {
    const u64 units = elements / 8;
    for (u64 first = 0; first < units; first += 16, scales += scale_bytes) {
        const u64 end = first + 16 < units ? first + 16 : units;
        u32 peak = 0;
        for (u64 i = first; i < end; i++) {
            const u32 other = finite_peak(x[i]);
            if (other > peak) peak = other;
        }
        const Fit fit = scale_bytes == 4 ? fit_f32(peak) : fit_ue8m0(peak);
        const u32 bits = ptx::mov_b32(fit.scale);
        if (scale_bytes == 4) {
            std::memcpy(scales, &bits, 4);
        } else {
            *scales = (u8)(bits >> 23);
        }
        for (u64 i = first; i < end; i++) codes[i] = encode8(x[i], fit.gain);
    }
}

u32 rounded_pair(float first, float second) { return pack_bf16(first, second); }

float decoded(u32 code) { return decode_e4m3(code); }

float scale_read(const u8* scales, u32 group, u32 scale_bytes) { return read_scale(scales, group, scale_bytes); }
}
