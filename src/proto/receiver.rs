//! The receiver: opens an operation, agrees on it, and waits for the arrivals (E1–E5).

use std::sync::Arc;

use bytemuck::{Zeroable, bytes_of, cast_slice, pod_read_unaligned};

use super::op::NodeAgreement;
use super::plan::Arrivals;
use super::{Buffer, Op, Port, Progress, Step};
use crate::error::{Kind, Reason, Wait};
use crate::wire::record::{EnterRecord, RailRecord, VerdictRecord};
use crate::wire::region::WordId;

/// The receiver of one rank's operation.
pub struct Receiver {
    op: Arc<Op>,
    phase: Phase,
}

enum Phase {
    Enter,
    Rail,
    Node,
    World,
    Arrivals,
}

impl Receiver {
    pub(super) fn new(op: Arc<Op>) -> Self {
        Self { op, phase: Phase::Enter }
    }

    /// E1.
    fn enter(&self, port: &impl Port) -> Result<(), Wait> {
        let op = &*self.op;
        let (started, poison) = (op.started_record(), op.poison.into());
        let Buffer { capacity, parts } = op.buffer;
        let record = EnterRecord { started, poison, capacity: capacity as u64, parts };
        for local in 0..op.ranks_per_node() {
            let at = op.map.enter(op.lane(), op.parity(), op.local());
            port.store(op.node_peer(local), at, bytes_of(&record));
            op.signal_turn(port, op.node_peer(local), WordId::Enter { local: op.local() });
        }
        let record = RailRecord { started, poison };
        let at = op.map.rail(op.lane(), op.parity(), op.node_index());
        for node in 0..op.nodes() {
            let counts: &[u32] = if op.plans() { op.plan.sends.counts(node) } else { &[] };
            self.send(port, node, at, &[bytes_of(&record), cast_slice(counts)]);
            op.signal_turn(port, op.rail_peer(node), WordId::Rail { node: op.node_index() });
        }
        Ok(())
    }

    /// Writes to the rail peer on `node`; the own node's copy is a plain store.
    fn send(&self, port: &impl Port, node: usize, mut at: usize, parts: &[&[u8]]) {
        let op = &*self.op;
        if node != op.node_index() {
            return port.put(op.rail_peer(node), at, parts);
        }
        for part in parts {
            port.store(op.rank, at, part);
            at += part.len();
        }
    }

    /// E2.
    fn rail(&self, port: &impl Port) -> Result<(), Wait> {
        let op = &*self.op;
        for node in 0..op.nodes() {
            op.await_turn(port, op.rail_peer(node), WordId::Rail { node })?;
        }
        let open = (0..op.nodes())
            .map(|node| op.poison.is_none() && self.agrees(&self.rail_record(port, op.rank, node)));
        assert!(op.open.set(open.collect()).is_ok(), "E2 is done once");
        if op.plans() {
            for local in 0..op.ranks_per_node() {
                op.signal_turn(port, op.node_peer(local), WordId::Gathered { local: op.local() });
            }
        }
        Ok(())
    }

    fn agrees(&self, record: &RailRecord) -> bool {
        record.started == self.op.started_record() && record.poison.read().is_none()
    }

    /// The rail record from `node` that lies at `holder`, a rank of the own node.
    fn rail_record(&self, port: &impl Port, holder: usize, node: usize) -> RailRecord {
        let at = self.op.map.rail(self.op.lane(), self.op.parity(), node);
        pod_read_unaligned(port.peer(holder, at, size_of::<RailRecord>()))
    }

    /// E3.
    fn node(&self, port: &impl Port) -> Result<(), Wait> {
        let op = &*self.op;
        for local in 0..op.ranks_per_node() {
            op.await_turn(port, op.node_peer(local), WordId::Enter { local })?;
        }
        let records: Vec<EnterRecord> = (0..op.ranks_per_node())
            .map(|local| op.map.enter(op.lane(), op.parity(), local))
            .map(|at| pod_read_unaligned(port.own(at, size_of::<EnterRecord>())))
            .collect();
        if op.plans() {
            // A rank out of step may have started what gathers nothing.
            let in_step = |local: &usize| records[*local].started == op.started_record();
            for local in (0..op.ranks_per_node()).filter(in_step) {
                op.await_turn(port, op.node_peer(local), WordId::Gathered { local })?;
            }
            let _ = op.plan.arrivals.set(self.count(port, in_step));
        }
        let verdict = self.judge(&records);
        let buffer = |r: &EnterRecord| Buffer { capacity: r.capacity as usize, parts: r.parts };
        let buffers = records.iter().map(buffer).collect();
        let agreed = op.node.set(NodeAgreement { good: verdict.is_good(), buffers });
        assert!(agreed.is_ok(), "E3 is done once");
        let at = op.map.verdict(op.lane(), op.parity(), op.node_index());
        for node in 0..op.nodes() {
            self.send(port, node, at, &[bytes_of(&verdict)]);
            op.signal_turn(port, op.rail_peer(node), WordId::Verdict { node: op.node_index() });
        }
        Ok(())
    }

    /// The counts of all source ranks lie at the ranks of this node, each at the one on its own rail.
    fn count(&self, port: &impl Port, in_step: impl Fn(&usize) -> bool) -> Arrivals {
        let op = &*self.op;
        let layout = op.map.counts();
        let mut words = vec![0u32; layout.words];
        let mut blocks = Vec::with_capacity(op.config.topology.world_size());
        for source in 0..op.config.topology.world_size() {
            let (node, local) = (op.config.topology.node_of(source), op.config.topology.local_of(source));
            let holder = op.node_peer(local);
            let agrees = in_step(&local) && self.agrees(&self.rail_record(port, holder, node));
            blocks.push(agrees.then(|| {
                let at = op.map.rail(op.lane(), op.parity(), node) + size_of::<RailRecord>();
                bytemuck::cast_slice_mut(&mut words).copy_from_slice(port.peer(holder, at, 4 * layout.words));
                words.clone()
            }));
        }
        Arrivals::new(&op.config, layout, op.rank, blocks.iter().map(Option::as_deref))
    }

    /// The node's verdict: the same at all its ranks, for it depends on nothing else than what all of them see.
    fn judge(&self, records: &[EnterRecord]) -> VerdictRecord {
        let op = &*self.op;
        let first = &records[0];
        for (local, record) in records.iter().enumerate() {
            if let Some(reason) = record.poison.read() {
                return VerdictRecord::refused(op.node_peer(local), reason, record.started);
            }
        }
        for (local, record) in records.iter().enumerate() {
            if record.started != first.started {
                let (rank, reference) = (op.node_peer(local), op.node_peer(0));
                return VerdictRecord::out_of_step(rank, record.started, reference, first.started);
            }
        }
        for (local, record) in records.iter().enumerate() {
            let needed = op.plan.arrivals.get().map_or(0, |arrivals| arrivals.rows(local));
            if op.started.kind != Kind::Plan && record.capacity < needed {
                let reason = Reason::BufferTooSmall { needed, capacity: record.capacity };
                return VerdictRecord::refused(op.node_peer(local), reason, record.started);
            }
        }
        VerdictRecord::good(op.node_peer(0), first.started)
    }

    /// E4.
    fn world(&self, port: &impl Port) -> Result<(), Wait> {
        let op = &*self.op;
        let mut verdicts = vec![VerdictRecord::zeroed(); op.nodes()];
        for (node, verdict) in verdicts.iter_mut().enumerate() {
            op.await_turn(port, op.rail_peer(node), WordId::Verdict { node })?;
            let at = op.map.verdict(op.lane(), op.parity(), node);
            *verdict = pod_read_unaligned(port.own(at, size_of::<VerdictRecord>()));
        }
        op.settle(&verdicts);
        Ok(())
    }

    /// E5.
    fn arrivals(&self, port: &impl Port) -> Result<(), Wait> {
        let op = &*self.op;
        if op.started.kind == Kind::Plan || op.node.get().is_none_or(|node| !node.good) {
            return Ok(());
        }
        for channel in 0..op.config.channels {
            for local in 0..op.ranks_per_node() {
                op.await_turn(port, op.node_peer(local), WordId::Done { local, channel })?;
            }
        }
        Ok(())
    }
}

impl Step for Receiver {
    fn step(&mut self, port: &impl Port) -> Progress {
        let (result, next) = match self.phase {
            Phase::Enter => (self.enter(port), Phase::Rail),
            Phase::Rail => (self.rail(port), Phase::Node),
            Phase::Node => (self.node(port), Phase::World),
            Phase::World => (self.world(port), Phase::Arrivals),
            Phase::Arrivals => match self.arrivals(port) {
                Ok(()) => return Progress::Done,
                Err(wait) => return Progress::Blocked(wait),
            },
        };
        match result {
            Ok(()) => {
                self.phase = next;
                Progress::Moved
            }
            Err(wait) => Progress::Blocked(wait),
        }
    }
}
