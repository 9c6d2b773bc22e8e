// The experts' outputs at the ranks of the node, read in place by both roles of combine.
#pragma once
#include "placement.cuh"

namespace railhop {

DEV const u8* output_row(const Params& p, u32 parity, const FinalRow& place) {
    const u64 region = peer_region(p, place.local);
    return at<u8>(region + parts_of(p, parity, place.local).x) + (u64)place.row * p.row_bytes;
}

/// The weights that go with an output, f32 [weights]; null where none are summed.
DEV const float* output_weights(const Params& p, u32 parity, const FinalRow& place) {
    if (p.weights == 0) return nullptr;
    const u64 region = peer_region(p, place.local);
    return at<float>(region + parts_of(p, parity, place.local).topk_weights) + (u64)place.row * p.weights;
}

}  // namespace railhop
