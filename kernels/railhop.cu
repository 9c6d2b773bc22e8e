// The communication kernels: each is a table of roles. What an operation launches, in stream order:
//   plan               plan
//   dispatch           plan, dispatch
//   combine            plan, combine
#include "arrival.cuh"
#include "forwarder.cuh"
#include "receiver.cuh"
#include "reducer.cuh"
#include "split.cuh"

namespace railhop {

/// Serves a warp's share of `streams` streams and whatever else it has to do, `step_other`, until both are done or the
/// rank is stopped. It polls them all and waits for none while another could move.
template <class StepStream, class StepOther>
DEV void serve(const Params& p, const Warp& warp, const RoleShare& share, u32 streams, StepStream step_stream, StepOther step_other) {
    Patience patience;
    for (;;) {
        Wait wait{};
        const Step other = step_other();
        bool moved = other == Step::Moved, done = other == Step::Done;
        ROLLED for (u32 stream = share.index; stream < streams; stream += share.count) {
            const Step step = step_stream(stream, wait);
            moved |= step == Step::Moved;
            done &= step == Step::Done;
        }
        if (done) return;
        if (moved) {
            patience.moved();
        } else if (!patience.rest_together(p, wait, warp.lane)) {
            return;
        }
    }
}

DEV Step nothing_else() { return Step::Done; }

/// The other node of ring `ring` of a channel, rotated by the own node so that not all start with the same peer.
DEV u32 node_of_ring(const Params& p, u32 ring) { return (p.node + 1 + ring) % p.nodes; }

DEV void dispatch_roles(const Params& p) {
    const Warp warp(p);
    Pipe pipe(p, warp);
    clear_scale_rows(p, warp);
    const HandleState& plan = *at<HandleState>(p.handle);
    const RoleShare share = split_warps(warp, plan.sent, (u64)plan.forwarded + plan.own, p.channels);
    if (share.first_role) {
        Sender sender(p, warp, pipe);
        const auto send = [&](u32 channel, Wait& wait) { return sender.step(channel, wait); };
        serve(p, warp, share, p.channels, send, nothing_else);
    } else {
        Forwarder forwarder(p, warp, pipe);
        OwnForwarder own(p, warp, pipe, share.index, share.count);
        const u32 rings = p.nodes - 1;
        const auto forward = [&](u32 stream, Wait& wait) {
            return forwarder.step(stream / rings, node_of_ring(p, stream % rings), wait);
        };
        serve(p, warp, share, p.channels * rings, forward, [&] { return own.step(); });
    }
    if (is_last(p, warp)) arrive(p, warp);
}

DEV void combine_roles(const Params& p) {
    const Warp warp(p);
    Pipe pipe(p, warp);
    const HandleState& plan = *at<HandleState>(p.handle);
    const u32 rings = p.nodes - 1;
    if (at<LaneState>(p.lane_state)->world_good) {
        const RoleShare share = split_warps(warp, plan.forwarded, plan.tokens, p.channels * rings);
        if (share.first_role) {
            CombineForwarder forwarder(p, warp, pipe);
            const auto forward = [&](u32 stream, Wait& wait) {
                return forwarder.step(stream / rings, node_of_ring(p, stream % rings), wait);
            };
            serve(p, warp, share, p.channels * rings, forward, nothing_else);
        } else {
            Reducer reducer(p, warp, pipe, share.index, share.count);
            const auto reduce = [&](u32 stream, Wait& wait) { return reducer.step(stream, wait); };
            // Without rings each warp has one stream: its share of the tokens.
            serve(p, warp, share, rings > 0 ? p.channels : share.count, reduce, nothing_else);
        }
    }
    if (is_last(p, warp)) arrive(p, warp);
}

}  // namespace railhop

KERNEL(plan, Params) { railhop::plan_roles(p); }
KERNEL(dispatch, Params) { railhop::dispatch_roles(p); }
KERNEL(combine, Params) { railhop::combine_roles(p); }

#include "local.cu"
