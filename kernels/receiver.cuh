// The receiver: opens an operation and agrees on it with the node and the rail (E1-E4). One block; waits are warp 0's.
#pragma once
#include "arrival.cuh"
#include "gather.cuh"
#include "queue.cuh"

namespace railhop {

class Receiver {
    const Params& p;
    u32 thread;
    u32 threads;
    LaneState& state;
    HandleState& plan;
    PlanShared& shared;
    u64 turn;
    u64 target;
    u32 parity;

public:
    DEV explicit Receiver(const Params& params)
        : p(params),
          thread(ptx::tid()),
          threads(ptx::ntid()),
          state(*at<LaneState>(p.lane_state)),
          plan(*at<HandleState>(p.handle)),
          shared(*reinterpret_cast<PlanShared*>(ptx::dynamic_smem())),
          turn(state.turn),
          target(advanced(turn, 1)),
          parity(turn & 1) {}

    /// Everything up to the node's verdict, and up to the world's where no rows move, or where they move only after it.
    /// Whether it came to its end; if not, the rank is stopped.
    DEV bool run() {
        if (!prepare()) return false;
        if (plans()) count();
        enter();
        if (!agree_on_rail() || !agree_on_node()) return false;
        judge();
        return p.kind == kind::DISPATCH || p.kind == kind::PLAN_DISPATCH || agree_on_world();
    }

private:
    DEV bool plans() const { return p.kind == kind::PLAN || p.kind == kind::PLAN_DISPATCH; }
    DEV void together() const { ptx::bar_sync(0, threads); }

    /// A wait of warp 0, for the whole block.
    template <class Wait>
    DEV bool waited(Wait wait) {
        if (thread < WARP) {
            const bool go_on = wait();
            if (thread == 0) shared.go_on = go_on;
        }
        together();
        const bool go_on = shared.go_on != 0;
        together();
        return go_on;
    }

    template <class T>
    DEV void copy(T* to, const void* from, u32 bytes) const {
        for (u32 i = thread; i < bytes / sizeof(T); i += threads) to[i] = static_cast<const T*>(from)[i];
    }

    /// What the last operation left behind is cleared, once the NIC has read what it was to send.
    DEV bool prepare() {
        const bool completed = waited([&] {
            return await_completions(p.rail_completions) && await_completions(p.verdict_completions);
        });
        if (!completed) return false;
        for (u32 i = thread; i < p.channels * p.nodes; i += threads) {
            at<u32>(p.outgoing)[i] = 0;
            at<u32>(p.incoming)[i] = 0;
        }
        for (u32 node = thread; node < p.nodes; node += threads) at<u32>(p.open)[node] = 0;
        if (thread == 0) {
            state.invalid = ~0ull;
            state.node_good = 0;
            state.world_good = 0;
        }
        together();
        return true;
    }

    DEV bool await_completions(u64 words) const {
        const auto self = [&](u32) { return own_rank(p); };
        const auto remote = [&](u32 node) { return node != p.node; };
        return await_words(p, thread, {words, {0, 0, 8}, 1, p.nodes, waits::COMPLETION}, turn, self, remote);
    }

    DEV void count() {
        for (u32 node = 0; node < p.nodes; node++) {
            u32* experts = counts_for(p, node) + p.count_experts;
            for (u32 i = thread; i < p.count_words - p.count_experts; i += threads) experts[i] = 0;
        }
        together();
        Counter counter(p, thread / WARP, thread % WARP);
        // What the host has refused can't be read.
        const bool readable = p.poison.code == 0;
        for (u32 channel = thread / WARP; channel < p.channels && readable; channel += threads / WARP) counter.count(channel);
        if (thread == 0) {
            plan.plan = turn;
            plan.tokens = p.tokens;
            plan.dispatched = 0;
        }
        together();
    }

    /// Why the own input is invalid, as far as anybody can tell.
    DEV ReasonRecord poison() const {
        if (p.poison.code != 0) return p.poison;
        if (plans() && state.invalid != ~0ull) {
            const u64 index = state.invalid, entry = (u64)at<i64>(p.topk_idx)[index];
            return {reason::EXPERT_OUT_OF_RANGE, {index / p.topk, index % p.topk, entry, p.num_experts}};
        }
        if (p.kind == kind::COMBINE && plan.dispatched == 0) return {reason::NOT_DISPATCHED, {0, 0, 0, 0}};
        return {0, {0, 0, 0, 0}};
    }

    /// E1.
    DEV void enter() {
        if (thread == 0) {
            EnterRecord record{p.started, poison(), p.capacity, p.parts};
            record.started.epoch = turn;
            record.started.plan = plan.plan;
            shared.enter = record;
        }
        together();
        for (u32 local = 0; local < p.ranks_per_node; local++) {
            copy(at<u64>(peer_region(p, local) + entry(p.enter_records, parity, p.local)), &shared.enter, sizeof(EnterRecord));
        }
        // A rail record is the front of an enter record.
        for (u32 node = 0; node < p.nodes; node++) {
            copy(at<u64>(entry(p.rail_outbox, 0, node)), &shared.enter, sizeof(RailRecord));
        }
        const u64 own = p.region + entry(p.rail_records, parity, p.node);
        copy(at<u64>(own), &shared.enter, sizeof(RailRecord));
        if (plans()) copy(at<u32>(own + COUNTS_AT), counts_for(p, p.node), p.count_words * sizeof(u32));
        together();
        signal_node(p.enter_words);
        tell_rail(opcode::RAIL, plans() ? 1 : 0, p.rail_words);
    }

    /// Signals the operation to every rank of the node.
    DEV void signal_node(const Table& words) const {
        for (u32 local = thread; local < p.ranks_per_node; local += threads) {
            signal(p, peer_region(p, local) + entry(words, 0, p.local), target);
        }
    }

    /// Has the outbox sent to every peer of the rail; the own place was written directly.
    DEV void tell_rail(u32 opcode, u32 count, const Table& words) const {
        for (u32 node = thread; node < p.nodes; node += threads) {
            if (node == p.node) {
                signal(p, p.region + entry(words, 0, node), target);
            } else {
                push(p, role::RECEIVER, {opcode, node, 0, count, target});
            }
        }
    }

    DEV bool agrees(const RailRecord& record) const {
        return record.poison.code == 0 && same_start(record.started, shared.enter.started);
    }

    /// E2.
    DEV bool agree_on_rail() {
        const auto rank = [&](u32 node) { return rank_of(p, node, p.local); };
        const bool arrived = waited([&] {
            return await_words(p, thread, {p.region, p.rail_words, 1, p.nodes, waits::RAIL}, target, rank, all_of_them);
        });
        if (!arrived) return false;
        for (u32 node = thread; node < p.nodes; node += threads) {
            const RailRecord& record = *at<RailRecord>(p.region + entry(p.rail_records, parity, node));
            at<u32>(p.open)[node] = shared.enter.poison.code == 0 && agrees(record);
        }
        if (plans()) signal_node(p.gathered_words);
        return true;
    }

    DEV const EnterRecord& entered(u32 local) const {
        return *at<EnterRecord>(p.region + entry(p.enter_records, parity, local));
    }

    /// A rank out of step may have started what gathers nothing.
    DEV bool in_step(u32 local) const { return same_start(entered(local).started, shared.enter.started); }

    /// E3, up to the verdict.
    DEV bool agree_on_node() {
        const auto rank = [&](u32 local) { return rank_of(p, p.node, local); };
        const bool arrived = waited([&] {
            const u32 ranks = p.ranks_per_node;
            if (!await_words(p, thread, {p.region, p.enter_words, 1, ranks, waits::ENTER}, target, rank, all_of_them)) return false;
            const auto gathers = [&](u32 local) { return plans() && in_step(local); };
            return await_words(p, thread, {p.region, p.gathered_words, 1, ranks, waits::GATHERED}, target, rank, gathers);
        });
        if (!arrived || !plans()) return arrived;
        for (u32 source = thread; source < p.nodes * p.ranks_per_node; source += threads) {
            const u32 local = source % p.ranks_per_node;
            const u64 record = peer_region(p, local) + entry(p.rail_records, parity, source / p.ranks_per_node);
            at<u32>(p.agrees)[source] = in_step(local) && agrees(*at<RailRecord>(record));
        }
        together();
        const Gatherer gatherer(p);
        gatherer.copy(parity);
        together();
        gatherer.sum();
        together();
        if (thread < WARP) gatherer.total();
        together();
        return true;
    }

    /// The node's verdict: the same at all its ranks, for it depends on nothing else than what all of them see.
    DEV VerdictRecord verdict_of_node() const {
        const StartedRecord& first = entered(0).started;
        for (u32 local = 0; local < p.ranks_per_node; local++) {
            const EnterRecord& record = entered(local);
            const u32 rank = rank_of(p, p.node, local);
            if (record.poison.code != 0) return {rank, 0, verdict::REFUSED, record.poison, record.started, {}};
        }
        for (u32 local = 0; local < p.ranks_per_node; local++) {
            const StartedRecord& started = entered(local).started;
            const u32 rank = rank_of(p, p.node, local), reference = rank_of(p, p.node, 0);
            if (!same_start(started, first)) return {rank, reference, verdict::OUT_OF_STEP, {}, started, first};
        }
        for (u32 local = 0; local < p.ranks_per_node && p.kind != kind::PLAN; local++) {
            const u64 needed = at<u64>(p.plan_rows)[local], capacity = entered(local).capacity;
            if (capacity >= needed) continue;
            const ReasonRecord small{reason::BUFFER_TOO_SMALL, {needed, capacity, 0, 0}};
            return {rank_of(p, p.node, local), 0, verdict::REFUSED, small, entered(local).started, {}};
        }
        return {rank_of(p, p.node, 0), 0, verdict::GOOD, {}, first, {}};
    }

    /// E3, the verdict.
    DEV void judge() {
        if (thread == 0) {
            shared.verdict = verdict_of_node();
            state.node_good = shared.verdict.state == verdict::GOOD;
            Report& report = *at<Report>(p.report);
            report.rows = at<u64>(p.plan_rows)[p.local];
            report.sent = plan.sent;
            ptx::st_release_sys(&report.planned, target);
        }
        together();
        copy(at<u64>(p.verdict_outbox), &shared.verdict, sizeof(VerdictRecord));
        copy(at<u64>(p.region + entry(p.verdict_records, parity, p.node)), &shared.verdict, sizeof(VerdictRecord));
        together();
        tell_rail(opcode::VERDICT, 0, p.verdict_words);
    }

    /// E4.
    DEV bool agree_on_world() {
        return waited([&] {
            bool stopped = false;
            const bool good = await_verdicts(p, thread, target, parity, stopped);
            if (thread == 0) state.world_good = good;
            return !stopped;
        });
    }
};

DEV void plan_roles(const Params& p) {
    Receiver receiver(p);
    const bool complete = receiver.run();
    if (p.kind != kind::PLAN || ptx::tid() >= WARP) return;
    const bool good = complete && at<LaneState>(p.lane_state)->world_good != 0;
    end_operation(p, ptx::tid(), !complete ? status::FAULT : good ? status::OK : status::REFUSED);
}

}  // namespace railhop
