//! One operation of one rank: what was started, and what its roles have agreed on so far.

use std::sync::{Arc, OnceLock};

use bytemuck::Zeroable;

use super::Port;
use super::plan::Plan;
use crate::config::Config;
use crate::error::{Error, Kind, Reason, Role, Started, Wait};
use crate::wire::record::{StartedRecord, VerdictRecord};
use crate::wire::region::{Lane, RegionMap, WordId};
use crate::wire::shape::{CombineSlot, DispatchSlot, RecvLayout, RecvParts, RowShape};
use crate::wire::word::{Index, Word};

/// A buffer in a region: the receive buffer of a dispatch, the expert outputs of a combine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Rows it holds.
    pub capacity: usize,
    /// Where its parts lie.
    pub parts: RecvParts,
}

impl Buffer {
    /// The buffer of `layout` at `offset` of its region.
    pub fn new(layout: &RecvLayout, offset: usize) -> Self {
        Self { capacity: layout.capacity, parts: layout.parts_at(offset) }
    }

    /// No buffer.
    pub fn none() -> Self {
        Self { capacity: 0, parts: RecvParts::zeroed() }
    }
}

/// What the caller of an operation decides.
#[derive(Debug)]
pub struct OpSpec {
    /// Kind, epoch, shape and plan, as every rank must have started them.
    pub started: Started,
    /// Shape of the rows; the BF16 shape of the outputs for a combine.
    pub shape: RowShape,
    /// Partial sums of `topk_weights` to return from a combine: 0 or topk.
    pub weights: usize,
    /// Why the input is invalid: the operation enters all the same, so that epochs stay in step.
    pub poison: Option<Reason>,
    /// The buffer that peers touch.
    pub buffer: Buffer,
    /// The plan that is made or used.
    pub plan: Arc<Plan>,
}

/// One operation of one rank, shared by its roles.
#[derive(Debug)]
pub struct Op {
    pub(crate) config: Arc<Config>,
    pub(crate) map: Arc<RegionMap>,
    pub(crate) rank: usize,
    pub(crate) generation: u16,
    pub(crate) started: Started,
    pub(crate) shape: RowShape,
    pub(crate) weights: usize,
    pub(crate) poison: Option<Reason>,
    pub(crate) buffer: Buffer,
    pub(crate) plan: Arc<Plan>,
    /// The operation's number on its lane, which tags its signals.
    turn: Index,
    /// Set at E2, by node: whether the pair with that rail peer is open.
    pub(crate) open: OnceLock<Vec<bool>>,
    /// Set at E3: the node's verdict and, if it is good, the buffers of the local ranks.
    pub(crate) node: OnceLock<NodeAgreement>,
    /// Set at E4.
    pub(crate) world: OnceLock<WorldAgreement>,
}

/// What the ranks of a node agree on.
#[derive(Debug)]
pub(crate) struct NodeAgreement {
    pub good: bool,
    pub buffers: Vec<Buffer>,
}

/// What the nodes agree on.
#[derive(Debug)]
pub(crate) struct WorldAgreement {
    /// By node, whether its verdict was good.
    pub good: Vec<bool>,
    pub result: Result<(), Error>,
}

impl Op {
    /// The `turn`th operation of its lane at `rank`.
    pub fn new(
        config: Arc<Config>,
        map: Arc<RegionMap>,
        rank: usize,
        generation: u16,
        turn: u64,
        spec: OpSpec,
    ) -> Self {
        let OpSpec { started, shape, weights, poison, buffer, plan } = spec;
        let turn = Index::new(config.first_index.wrapping_add(turn));
        let (open, node, world) = Default::default();
        Self {
            config,
            map,
            rank,
            generation,
            started,
            shape,
            weights,
            poison,
            buffer,
            plan,
            turn,
            open,
            node,
            world,
        }
    }

    /// What all ranks come to, once E4 is done.
    pub fn result(&self) -> Option<&Result<(), Error>> {
        self.world.get().map(|world| &world.result)
    }

    /// The operation's kind and epoch as started.
    pub fn started(&self) -> &Started {
        &self.started
    }

    /// The plan made or used.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    pub(crate) fn node_index(&self) -> usize {
        self.config.topology.node_of(self.rank)
    }

    pub(crate) fn local(&self) -> usize {
        self.config.topology.local_of(self.rank)
    }

    pub(crate) fn nodes(&self) -> usize {
        self.config.topology.nodes()
    }

    pub(crate) fn ranks_per_node(&self) -> usize {
        self.config.topology.ranks_per_node()
    }

    /// The rank on `node` of the own rail.
    pub(crate) fn rail_peer(&self, node: usize) -> usize {
        self.config.topology.rank(node, self.local())
    }

    /// The rank at `local` on the own node.
    pub(crate) fn node_peer(&self, local: usize) -> usize {
        self.config.topology.rank(self.node_index(), local)
    }

    /// The other nodes, rotated so that senders do not all start with the same peer (incast).
    pub(crate) fn remote_nodes(&self) -> impl Iterator<Item = usize> + use<> {
        let (own, nodes) = (self.node_index(), self.nodes());
        (1..nodes).map(move |step| (own + step) % nodes)
    }

    pub(crate) fn lane(&self) -> Lane {
        Lane::of(self.started.kind)
    }

    /// Whether counts are exchanged.
    pub(crate) fn plans(&self) -> bool {
        matches!(self.started.kind, Kind::Plan | Kind::PlanDispatch)
    }

    /// Which of the two places of each record the operation uses.
    pub(crate) fn parity(&self) -> usize {
        self.turn.get() as usize % 2
    }

    pub(crate) fn started_record(&self) -> StartedRecord {
        (&self.started).into()
    }

    pub(crate) fn dispatch_slot(&self) -> DispatchSlot {
        DispatchSlot::new(&self.shape)
    }

    pub(crate) fn combine_slot(&self) -> CombineSlot {
        CombineSlot::new(self.shape.hidden, self.weights)
    }

    /// Slot pitch on the operation's rings.
    pub(crate) fn pitch(&self) -> usize {
        match self.lane() {
            Lane::Dispatch => self.dispatch_slot().pitch,
            Lane::Combine => self.combine_slot().pitch,
        }
    }

    pub(crate) fn word(&self, id: WordId) -> usize {
        self.map.word(self.lane(), id)
    }

    /// Publishes, in `rank`'s word `id`, that this operation has come that far.
    pub(crate) fn signal_turn(&self, port: &impl Port, rank: usize, id: WordId) {
        port.signal(rank, self.word(id), Word::new(self.generation, self.turn.advance(1)).0);
    }

    /// Whether the own word `id`, written by `peer`, has come as far as this operation.
    pub(crate) fn await_turn(&self, port: &impl Port, peer: usize, id: WordId) -> Result<(), Wait> {
        let target = self.turn.advance(1);
        let start = Index::new(self.config.first_index);
        let seen = Word(port.load(self.word(id))).index_in(self.generation).unwrap_or(start);
        match seen.has_reached(target) {
            true => Ok(()),
            false => {
                let channel = match id {
                    WordId::Done { channel, .. } => Some(channel),
                    _ => None,
                };
                let (expected, seen) = (target.get(), seen.get());
                Err(Wait { role: Role::Receiver, channel, peer, what: id.name(), expected, seen })
            }
        }
    }

    /// D4, C4.
    pub(crate) fn signal_done(&self, port: &impl Port, channel: usize) {
        for local in 0..self.ranks_per_node() {
            self.signal_turn(port, self.node_peer(local), WordId::Done { local: self.local(), channel });
        }
    }

    /// The world's verdicts, as E4 leaves them.
    pub(crate) fn settle(&self, verdicts: &[VerdictRecord]) {
        let good = verdicts.iter().map(VerdictRecord::is_good).collect();
        let result = VerdictRecord::of_world(verdicts);
        assert!(self.world.set(WorldAgreement { good, result }).is_ok(), "E4 is done once");
    }
}
