//! The symmetric region: one piece of memory per rank, laid out alike on all ranks, in which everything
//! that peers read or write lies. Offsets and size come from one pass.

use super::record::{CountBlock, EnterRecord, RailRecord, VerdictRecord};
use super::shape::max_pitches;
use super::{LINE, align_up};
use crate::config::Config;
use crate::error::Kind;

/// Operations of one lane are sequential; the two lanes are independent, with their own words and rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Plan and dispatch.
    Dispatch,
    /// Combine.
    Combine,
}

impl Lane {
    /// The lane on which operations of `kind` run.
    pub fn of(kind: Kind) -> Self {
        match kind {
            Kind::Plan | Kind::Dispatch | Kind::PlanDispatch => Self::Dispatch,
            Kind::Combine => Self::Combine,
        }
    }
}

/// The lanes, in the order of the region.
pub const LANES: [Lane; 2] = [Lane::Dispatch, Lane::Combine];

/// An index word of a lane. `local` and `node` name who writes it, or, of the private words, the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WordId {
    /// Operation whose enter record local rank has stored.
    Enter {
        /// Writer.
        local: usize,
    },
    /// Operation for which local rank has gathered the counts of its rail.
    Gathered {
        /// Writer.
        local: usize,
    },
    /// Operation whose rail record has come from the rail peer on `node`.
    Rail {
        /// Writer's node.
        node: usize,
    },
    /// Operation whose verdict has come from `node`.
    Verdict {
        /// Writer's node.
        node: usize,
    },
    /// Operation in which `local`'s `channel` no longer touches this rank's buffer: all its rows have
    /// arrived (dispatch), or all have been read (combine).
    Done {
        /// Writer.
        local: usize,
        /// Writer's channel.
        channel: usize,
    },
    /// Tail of the ring from `node`.
    Tail {
        /// Channel of the ring.
        channel: usize,
        /// Sender's node.
        node: usize,
    },
    /// Head of the ring to `node`: the credit it returned.
    Head {
        /// Channel of the ring.
        channel: usize,
        /// Receiver's node.
        node: usize,
    },
    /// Private: this rank's tail of the ring to `node`.
    Sent {
        /// Channel of the ring.
        channel: usize,
        /// Receiver's node.
        node: usize,
    },
    /// Private: this rank's head of the ring from `node`.
    Taken {
        /// Channel of the ring.
        channel: usize,
        /// Sender's node.
        node: usize,
    },
}

impl WordId {
    /// What a wait for this word is called in faults.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Enter { .. } => "enter record",
            Self::Gathered { .. } => "gathered counts",
            Self::Rail { .. } => "rail record",
            Self::Verdict { .. } => "verdict",
            Self::Done { .. } => "arrivals",
            Self::Tail { .. } | Self::Sent { .. } => "tail",
            Self::Head { .. } | Self::Taken { .. } => "credit",
        }
    }
}

/// Bytes that one rank takes, part by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Index words and records.
    pub control: usize,
    /// Rings of both lanes: `channels × rail peers × slots × (dispatch + combine pitch)`, whatever the batch.
    pub rings: usize,
    /// The pool of receive buffers and expert outputs.
    pub pool: usize,
    /// The whole region: what is mapped.
    pub region: usize,
}

/// Offsets of everything in a region.
#[derive(Debug, Clone)]
pub struct RegionMap {
    nodes: usize,
    ranks_per_node: usize,
    channels: usize,
    slots: usize,
    lanes: [LaneMap; 2],
    counts: CountBlock,
    /// Offset of the pool.
    pub pool: usize,
    /// What the region takes.
    pub memory: Memory,
}

/// What of a lane lies at an offset.
enum Part {
    /// The word of this index.
    Word(usize),
    Record,
    /// In the ring of a channel, so far from its first slot.
    Ring {
        channel: usize,
        within: usize,
    },
}

#[derive(Debug, Clone, Copy, Default)]
struct LaneMap {
    words: usize,
    // Records have two places each, by the operation's parity: a rank starts its operation n + 2 only
    // after every peer has completed n, for completing n + 1 took a record of n + 1 from each of them.
    enter: usize,
    rail: usize,
    verdict: usize,
    rings: usize,
    max_pitch: usize,
}

impl RegionMap {
    /// The map for worlds of `config`.
    pub fn new(config: &Config) -> Self {
        let (nodes, ranks_per_node) = (config.topology().nodes(), config.topology().ranks_per_node());
        let counts = CountBlock::new(config);
        let (dispatch_pitch, combine_pitch) = max_pitches(config);
        let mut map = Self {
            nodes,
            ranks_per_node,
            channels: config.channels(),
            slots: config.ring_slots(),
            lanes: [LaneMap::default(); 2],
            counts,
            pool: 0,
            memory: Memory { control: 0, rings: 0, pool: config.pool_bytes, region: 0 },
        };
        let mut end = 0;
        let mut take = |bytes: usize| {
            let start = end;
            end = align_up(start + bytes, LINE);
            start
        };
        for lane in 0..2 {
            map.lanes[lane].words = take(map.words_per_lane() * LINE);
            map.lanes[lane].enter = take(2 * ranks_per_node * map.enter_stride());
            map.lanes[lane].rail = take(2 * nodes * map.rail_stride());
            map.lanes[lane].verdict = take(2 * nodes * map.verdict_stride());
        }
        map.memory.control = take(0);
        for (lane, pitch) in [dispatch_pitch, combine_pitch].into_iter().enumerate() {
            map.lanes[lane].max_pitch = pitch;
            map.lanes[lane].rings = take(config.channels() * (nodes - 1) * config.ring_slots() * pitch);
        }
        map.pool = take(0);
        map.memory.rings = map.pool - map.memory.control;
        take(config.pool_bytes);
        map.memory.region = take(0);
        map
    }

    fn words_per_lane(&self) -> usize {
        2 * self.ranks_per_node + 2 * self.nodes + self.channels * (self.ranks_per_node + 4 * self.nodes)
    }

    fn enter_stride(&self) -> usize {
        align_up(size_of::<EnterRecord>(), LINE)
    }

    fn rail_stride(&self) -> usize {
        align_up(size_of::<RailRecord>() + 4 * self.counts.words, LINE)
    }

    fn verdict_stride(&self) -> usize {
        align_up(size_of::<VerdictRecord>(), LINE)
    }

    /// The layout of count blocks.
    pub fn counts(&self) -> &CountBlock {
        &self.counts
    }

    /// Offset of an index word. Each has a line of its own.
    pub fn word(&self, lane: Lane, id: WordId) -> usize {
        let (r, n, c) = (self.ranks_per_node, self.nodes, self.channels);
        let done = 2 * r + 2 * n;
        let ring =
            |table: usize, channel: usize, node: usize| done + c * r + (table * c + channel) * n + node;
        let index = match id {
            WordId::Enter { local } => local,
            WordId::Gathered { local } => r + local,
            WordId::Rail { node } => 2 * r + node,
            WordId::Verdict { node } => 2 * r + n + node,
            WordId::Done { local, channel } => done + channel * r + local,
            WordId::Tail { channel, node } => ring(0, channel, node),
            WordId::Head { channel, node } => ring(1, channel, node),
            WordId::Sent { channel, node } => ring(2, channel, node),
            WordId::Taken { channel, node } => ring(3, channel, node),
        };
        self.lanes[lane as usize].words + index * LINE
    }

    /// Offset of the enter record of `local` for operations of `parity`.
    pub fn enter(&self, lane: Lane, parity: usize, local: usize) -> usize {
        self.lanes[lane as usize].enter + (parity * self.ranks_per_node + local) * self.enter_stride()
    }

    /// Offset of the rail record from `node`; the count block follows it.
    pub fn rail(&self, lane: Lane, parity: usize, node: usize) -> usize {
        self.lanes[lane as usize].rail + (parity * self.nodes + node) * self.rail_stride()
    }

    /// Offset of the verdict of `node`.
    pub fn verdict(&self, lane: Lane, parity: usize, node: usize) -> usize {
        self.lanes[lane as usize].verdict + (parity * self.nodes + node) * self.verdict_stride()
    }

    /// Offset, in the region of a rank on `to`, of the ring that holds what comes from `from`.
    pub fn ring(&self, lane: Lane, channel: usize, from: usize, to: usize) -> usize {
        debug_assert_ne!(from, to, "tokens for the own node skip hop 1");
        self.ring_place(lane, channel, if from < to { from } else { from - 1 })
    }

    /// Offset of the ring of the `peer`th other node, ascending. Send rings on a device mirror these places.
    pub fn ring_place(&self, lane: Lane, channel: usize, peer: usize) -> usize {
        let lane = &self.lanes[lane as usize];
        lane.rings + (channel * (self.nodes - 1) + peer) * self.slots * lane.max_pitch
    }

    /// Offset of the first ring: what lies from here to the pool is rings.
    pub fn rings(&self) -> usize {
        self.pool - self.memory.rings
    }

    /// The largest slot pitch of the lane's rings.
    pub fn max_pitch(&self, lane: Lane) -> usize {
        self.lanes[lane as usize].max_pitch
    }

    /// Number of streams: what rail peers write comes in so many independent orders.
    pub fn streams(&self) -> usize {
        LANES.len() * (1 + self.channels)
    }

    /// The stream of what rail peers write at `offset`, words included: puts and signals of one stream stay in order. A
    /// lane's records are one, the ring of each of its channels is another, so each has one role at a time as its
    /// writer.
    pub fn stream(&self, offset: usize) -> usize {
        let (lane, part) = self.find(offset);
        let channel = match part {
            Part::Word(index) => self.ring_channel(index),
            Part::Ring { channel, .. } => Some(channel),
            Part::Record => None,
        };
        lane * (1 + self.channels) + channel.map_or(0, |channel| 1 + channel)
    }

    /// Where, in a mirror of the region, a rank on node `own` keeps what it puts at `offset` of its rail peer on `to`:
    /// every peer has places of its own there, as it has in the region as a sender.
    pub fn staged(&self, offset: usize, own: usize, to: usize) -> usize {
        let (lane, part) = self.find(offset);
        match part {
            Part::Ring { channel, within } => self.ring(LANES[lane], channel, to, own) + within,
            // Records of one kind lie at equal distances, by node.
            _ if offset < self.lanes[lane].verdict => {
                offset + to * self.rail_stride() - own * self.rail_stride()
            }
            _ => offset + to * self.verdict_stride() - own * self.verdict_stride(),
        }
    }

    /// The lane and the part that `offset` is in.
    fn find(&self, offset: usize) -> (usize, Part) {
        let [first, second] = &self.lanes;
        let lane = usize::from(match offset < first.rings {
            true => offset >= second.words,
            false => offset >= second.rings,
        });
        let lanes = &self.lanes[lane];
        let part = if offset < lanes.enter {
            Part::Word((offset - lanes.words) / LINE)
        } else if offset < first.rings {
            Part::Record
        } else {
            let ring = self.slots * lanes.max_pitch;
            let index = (offset - lanes.rings) / ring;
            Part::Ring { channel: index / (self.nodes - 1), within: (offset - lanes.rings) % ring }
        };
        (lane, part)
    }

    /// The channel whose ring the `index`th word of a lane belongs to.
    fn ring_channel(&self, index: usize) -> Option<usize> {
        let first = 2 * self.ranks_per_node + 2 * self.nodes + self.channels * self.ranks_per_node;
        Some(index.checked_sub(first)? / self.nodes % self.channels)
    }

    /// Bytes from one node's rail record (and counts) to the next's.
    pub fn rail_bytes(&self) -> usize {
        self.rail_stride()
    }
}

impl Config {
    /// The exact bytes that each rank's region takes: what is mapped, no more and no less. Beside it, a
    /// handle keeps O(tokens) of metadata ([`Config::handle_bytes`]).
    pub fn memory(&self) -> Memory {
        RegionMap::new(self).memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Topology;

    fn config(nodes: usize, ranks_per_node: usize) -> Config {
        let topology = Topology::new(nodes, ranks_per_node).unwrap();
        Config::builder(topology).experts(20).channels(3).pool_bytes(1000).build().unwrap()
    }

    #[test]
    fn nothing_overlaps() {
        for (nodes, ranks) in [(1, 1), (1, 8), (3, 5), (4, 2)] {
            let map = RegionMap::new(&config(nodes, ranks));
            let mut taken = Vec::new();
            for lane in LANES {
                let mut word = |id| taken.push((map.word(lane, id), 8));
                for local in 0..ranks {
                    word(WordId::Enter { local });
                    word(WordId::Gathered { local });
                    (0..3).for_each(|channel| word(WordId::Done { local, channel }));
                }
                for node in 0..nodes {
                    word(WordId::Rail { node });
                    word(WordId::Verdict { node });
                    for channel in 0..3 {
                        word(WordId::Tail { channel, node });
                        word(WordId::Head { channel, node });
                        word(WordId::Sent { channel, node });
                        word(WordId::Taken { channel, node });
                    }
                }
                for parity in 0..2 {
                    (0..ranks)
                        .for_each(|l| taken.push((map.enter(lane, parity, l), size_of::<EnterRecord>())));
                    let rail = size_of::<RailRecord>() + 4 * map.counts.words;
                    (0..nodes).for_each(|n| taken.push((map.rail(lane, parity, n), rail)));
                    (0..nodes)
                        .for_each(|n| taken.push((map.verdict(lane, parity, n), size_of::<VerdictRecord>())));
                }
                for (channel, from) in (0..3).flat_map(|c| (1..nodes).map(move |n| (c, n))) {
                    taken.push((
                        map.ring(lane, channel, from, 0),
                        map.slots * map.lanes[lane as usize].max_pitch,
                    ));
                }
            }
            taken.push((map.pool, map.memory.pool));
            taken.sort_unstable();
            assert!(taken.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
            let (start, bytes) = *taken.last().unwrap();
            assert!(start + bytes <= map.memory.region);
        }
    }

    #[test]
    fn every_stream_is_one_writers() {
        let map = RegionMap::new(&config(3, 2));
        let streams = |lane: Lane| {
            let first = lane as usize * 4;
            for node in 0..3 {
                let words = [WordId::Rail { node }, WordId::Verdict { node }];
                words.iter().for_each(|&id| assert_eq!(map.stream(map.word(lane, id)), first));
                let records = [map.rail(lane, 1, node), map.verdict(lane, 0, node)];
                records.iter().for_each(|&at| assert_eq!(map.stream(at), first));
                for channel in 0..3 {
                    let words = [WordId::Tail { channel, node }, WordId::Head { channel, node }];
                    words
                        .iter()
                        .for_each(|&id| assert_eq!(map.stream(map.word(lane, id)), first + 1 + channel));
                    let slot = map.ring(lane, channel, node, (node + 1) % 3) + map.max_pitch(lane);
                    assert_eq!(map.stream(slot), first + 1 + channel);
                }
            }
        };
        LANES.into_iter().for_each(streams);
        assert_eq!(map.streams(), 8);
    }

    #[test]
    fn what_is_put_at_every_peer_is_kept_apart() {
        let map = RegionMap::new(&config(3, 2));
        for (lane, own) in LANES.into_iter().flat_map(|lane| (0..3).map(move |own| (lane, own))) {
            for to in (0..3).filter(|&to| to != own) {
                for parity in 0..2 {
                    assert_eq!(map.staged(map.rail(lane, parity, own), own, to), map.rail(lane, parity, to));
                    let verdict = map.verdict(lane, parity, own);
                    assert_eq!(map.staged(verdict, own, to), map.verdict(lane, parity, to));
                }
                for channel in 0..3 {
                    let slot = map.ring(lane, channel, own, to) + 3 * map.max_pitch(lane) + 16;
                    let kept = map.ring(lane, channel, to, own) + 3 * map.max_pitch(lane) + 16;
                    assert_eq!(map.staged(slot, own, to), kept);
                }
            }
        }
    }

    #[test]
    fn parts_add_up() {
        let memory = config(4, 2).memory();
        assert_eq!(align_up(memory.control + memory.rings + memory.pool, LINE), memory.region);
        assert_eq!(config(1, 8).memory().rings, 0, "a single node has no rings");
    }
}
