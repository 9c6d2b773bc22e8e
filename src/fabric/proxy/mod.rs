//! The proxy: does on the rail what a rank's kernels ask for through the command queue in its mailbox.
//!
//! It stands in `fabric`, not beside the engines, because it knows no role and no operation: it needs what
//! `wire` says of commands and a rail to post to, and whatever drives kernels can use it.
//!
//! The ordering argument's half at this end: a command is believed when both halves, acquired, carry the
//! phase of their lap, so the kernel's release before them covers the data; `taken` is released after both
//! halves have been read; a completion word is released after the rail has read the source. The other half
//! stands in `kernels/queue.cuh` and `kernels/ring.cuh`.

mod thread;

pub use thread::{Patience, ProxyThread};

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::mapped::Mapped;
use super::rail::{Completion, Rail, RailError};
use crate::config::Config;
use crate::error::ConfigError;
use crate::wire::command::{Command, PHASE_BIT, opcode};
use crate::wire::device::{MailboxMap, PrivateMap, QUEUE_CAPACITY};
use crate::wire::kernel::Maps;
use crate::wire::posting::Posting;
use crate::wire::region::RegionMap;
use crate::wire::word::{INDEX_BITS, Index};

/// Commands a step takes at most: how late `taken` may be, and how late a completion.
const BATCH: usize = 64;

/// Up to this size, chunks that lie one behind the other become one put. A NIC's cost per message no longer
/// shows in a put as large, and to merge larger ones would only hold back the first chunk's signal.
pub const MERGE_BYTES: usize = 32 << 10;

/// Drains the command queue of one rank into a rail: the logic without a thread.
#[derive(Debug)]
pub struct Proxy<R> {
    config: Arc<Config>,
    region: Arc<RegionMap>,
    private_map: PrivateMap,
    mailbox_map: MailboxMap,
    rank: usize,
    generation: u16,
    mailbox: Mapped,
    rail: R,
    merge_bytes: usize,
    /// Commands taken so far.
    taken: u64,
    /// What the commands taken last come to; those before `posted` are the rail's.
    postings: Vec<Posting>,
    posted: usize,
    completions: Vec<Completion>,
}

/// What a step did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drained {
    /// Commands taken from the queue.
    pub commands: usize,
    /// Postings given to the rail.
    pub postings: usize,
    /// Completions written to the mailbox.
    pub completions: usize,
}

impl Drained {
    /// Whether anything moved.
    pub fn moved(&self) -> bool {
        *self != Self::default()
    }
}

/// A command that no kernel of this world can have meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("command {place} of rank {rank}: {field} = {value}, {expected} expected")]
pub struct CommandError {
    /// The rank whose kernels pushed it.
    pub rank: usize,
    /// How many commands came before it.
    pub place: u64,
    /// The field that can't be.
    pub field: &'static str,
    /// What it holds.
    pub value: u64,
    /// What it may hold.
    pub expected: String,
}

/// Why a proxy stopped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// The queue holds a command that makes no sense: memory has been overwritten, or kernels and host
    /// disagree.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The rail has failed.
    #[error(transparent)]
    Rail(#[from] RailError),
    /// The rail panicked; the message.
    #[error("the rail panicked: {0}")]
    Panicked(String),
}

impl<R: Rail> Proxy<R> {
    /// The proxy of `rank`, which goes on in `mailbox` where the last one stopped. All it signals belongs to
    /// `generation`.
    ///
    /// # Errors
    /// `mailbox` is smaller than a mailbox of such a world.
    pub fn new(
        config: Arc<Config>,
        region: Arc<RegionMap>,
        rank: usize,
        generation: u16,
        mailbox: Mapped,
        rail: R,
    ) -> Result<Self, ConfigError> {
        let private_map = PrivateMap::new(&config, &region);
        let mailbox_map = MailboxMap::new(&config, rank);
        if mailbox.bytes() < mailbox_map.bytes {
            return Err(ConfigError {
                field: "mailbox bytes",
                value: mailbox.bytes() as u64,
                reason: format!("the mailbox of rank {rank} is larger"),
                nearest: Some(mailbox_map.bytes as u64),
            });
        }
        let mut proxy = Self {
            config,
            region,
            private_map,
            mailbox_map,
            rank,
            generation,
            mailbox,
            rail,
            merge_bytes: MERGE_BYTES,
            taken: 0,
            postings: Vec::with_capacity(BATCH),
            posted: 0,
            completions: Vec::new(),
        };
        proxy.taken = proxy.word(proxy.mailbox_map.taken).load(Ordering::Relaxed);
        Ok(proxy)
    }

    /// Merges chunks into puts of at most `bytes`, instead of [`MERGE_BYTES`].
    pub fn merge_up_to(self, bytes: usize) -> Self {
        Self { merge_bytes: bytes, ..self }
    }

    /// The rail.
    pub fn rail(&self) -> &R {
        &self.rail
    }

    /// Its rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Whether all that was taken has been posted, and all that was posted has left its source.
    pub fn is_idle(&self) -> bool {
        self.postings.is_empty() && self.rail.is_idle()
    }

    /// Takes the commands that are there, a batch at most, posts them and passes completions on; never waits.
    ///
    /// # Errors
    /// The next command makes no sense (those before it have been posted), or the rail has failed. The proxy
    /// is of no further use.
    pub fn step(&mut self) -> Result<Drained, ProxyError> {
        // A rail without room gets the rest of the last batch first.
        let commands = if self.postings.is_empty() { self.take()? } else { 0 };
        let postings = self.post()?;
        if commands > 0 {
            self.word(self.mailbox_map.taken).store(self.taken, Ordering::Release);
        }
        Ok(Drained { commands, postings, completions: self.complete()? })
    }

    fn take(&mut self) -> Result<usize, CommandError> {
        let mut commands = 0;
        while commands < BATCH
            && let Some(halves) = self.next()
        {
            match self.resolve(halves) {
                Ok(posting) => self.append(posting),
                // The next step finds it again, when what came before has been posted.
                Err(_) if commands > 0 => break,
                Err(error) => return Err(error),
            }
            self.taken += 1;
            commands += 1;
        }
        Ok(commands)
    }

    /// The next command's halves, if both are there.
    fn next(&self) -> Option<[u64; 2]> {
        // Lap 0 has phase 1: zeroed memory holds no command.
        let phase = self.taken & QUEUE_CAPACITY as u64 == 0;
        let at = self.mailbox_map.queue + 16 * (self.taken as usize & (QUEUE_CAPACITY - 1));
        let halves = [at, at + 8].map(|half| self.word(half).load(Ordering::Acquire));
        halves.iter().all(|half| (half >> PHASE_BIT == 1) == phase).then_some(halves)
    }

    /// What the command comes to. [`Command::posting`] takes fields for granted: they are checked here.
    fn resolve(&self, halves: [u64; 2]) -> Result<Posting, CommandError> {
        let command = Command::read(halves);
        self.check(&command, halves[1] & !(1 << PHASE_BIT))?;
        let Self { config, region, private_map: private, mailbox_map: mailbox, .. } = self;
        Ok(command.posting(Maps { config, region, private, mailbox }, self.rank, self.generation))
    }

    fn check(&self, command: &Command, index: u64) -> Result<(), CommandError> {
        let topology = self.config.topology();
        let own = topology.node_of(self.rank);
        if command.node == own {
            return Err(self.refuse("node", own as u64, "another node than the own".into()));
        }
        self.within("node", command.node, 0, topology.nodes() - 1)?;
        let on_ring = matches!(command.opcode, opcode::CHUNK | opcode::CREDIT);
        self.within("channel", command.channel, 0, if on_ring { self.config.channels() - 1 } else { 0 })?;
        match command.opcode {
            opcode::CHUNK => {
                // A chunk does not wrap around.
                let slots = self.config.ring_slots();
                let end = (command.index.get() as usize).wrapping_sub(1) % slots + 1;
                self.within("count", command.count, 1, end)?;
                self.within("pitch", command.pitch, 1, self.region.max_pitch(command.lane))?;
            }
            opcode::RAIL => self.within("count", command.count, 0, 1)?,
            _ => self.within("count", command.count, 0, 0)?,
        }
        match index >> INDEX_BITS {
            0 => Ok(()),
            _ => Err(self.refuse("index", index, format!("at most {}", Index::new(u64::MAX).get()))),
        }
    }

    fn within(
        &self,
        field: &'static str,
        value: usize,
        least: usize,
        most: usize,
    ) -> Result<(), CommandError> {
        match (least..=most).contains(&value) {
            true => Ok(()),
            false => Err(self.refuse(field, value as u64, format!("{least} to {most}"))),
        }
    }

    #[cold]
    fn refuse(&self, field: &'static str, value: u64, expected: String) -> CommandError {
        CommandError { rank: self.rank, place: self.taken, field, value, expected }
    }

    /// Appends to the batch, or to its last posting.
    fn append(&mut self, posting: Posting) {
        match self.postings.last_mut().and_then(|last| merged(last, &posting, self.merge_bytes)) {
            Some(merged) => *self.postings.last_mut().expect("what was merged with") = merged,
            None => self.postings.push(posting),
        }
    }

    fn post(&mut self) -> Result<usize, RailError> {
        let rest = &self.postings[self.posted..];
        if rest.is_empty() {
            return Ok(0);
        }
        let count = self.rail.post(rest)?;
        self.posted += count;
        if self.posted == self.postings.len() {
            self.postings.clear();
            self.posted = 0;
        }
        Ok(count)
    }

    fn complete(&mut self) -> Result<usize, RailError> {
        self.rail.poll(&mut self.completions)?;
        for Completion { offset, value } in &self.completions {
            let (peer, bytes) = (self.rank, size_of::<u64>());
            let outside = || RailError::OutOfRange { what: "the completion", peer, offset: *offset, bytes };
            self.mailbox.word(*offset).ok_or_else(outside)?.store(value.0, Ordering::Release);
        }
        let count = self.completions.len();
        self.completions.clear();
        Ok(count)
    }

    /// Tells the rank's kernels to return: what they wait for will not come.
    fn abort(&self) {
        let flag = self.mailbox.flag(self.mailbox_map.abort);
        flag.expect("`new` has seen the mailbox's size").store(1, Ordering::Release);
    }

    /// A word of the mailbox's own map.
    #[inline]
    fn word(&self, offset: usize) -> &AtomicU64 {
        self.mailbox.word(offset).expect("`new` has seen the mailbox's size")
    }
}

/// One posting that does what two adjacent ones of the same word do, if their data lies one behind the other
/// at both ends and does not come to more than `most` bytes. The later index covers the earlier: the word is
/// written once.
fn merged(first: &Posting, second: &Posting, most: usize) -> Option<Posting> {
    let same = |p: &Posting| (p.peer, p.queue, p.word, p.completion);
    let behind = |p: &Posting| (p.source + p.bytes, p.target + p.bytes);
    let bytes = first.bytes + second.bytes;
    let fits =
        same(first) == same(second) && behind(first) == (second.source, second.target) && bytes <= most;
    fits.then_some(Posting { bytes, value: second.value, ..*first })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::word::Word;

    fn put(source: usize, bytes: usize, value: u64) -> Posting {
        let (completion, value) = ((bytes > 0).then_some(64), Word(value));
        Posting { peer: 1, queue: 0, source, target: source + 512, bytes, word: 8, completion, value }
    }

    #[test]
    fn what_lies_behind_is_merged_and_the_last_index_stays() {
        assert_eq!(merged(&put(0, 10, 1), &put(10, 20, 2), 30), Some(put(0, 30, 2)));
        assert_eq!(merged(&put(0, 10, 1), &put(10, 20, 2), 29), None, "too large");
        assert_eq!(merged(&put(20, 10, 1), &put(0, 10, 2), 99), None, "the ring's end lies between");
        assert_eq!(merged(&put(0, 10, 1), &Posting { target: 0, ..put(10, 10, 2) }, 99), None);
        assert_eq!(merged(&put(0, 10, 1), &Posting { word: 16, ..put(10, 10, 2) }, 99), None);
        assert_eq!(merged(&put(0, 10, 1), &Posting { peer: 2, ..put(10, 10, 2) }, 99), None);
        assert_eq!(merged(&put(0, 10, 1), &Posting { queue: 2, ..put(10, 10, 2) }, 99), None);
        // Credit has no data: the later index says it all. A record is put to where the last one was.
        let credit = |value| Posting { source: 0, target: 0, ..put(0, 0, value) };
        assert_eq!(merged(&credit(1), &credit(2), 0), Some(credit(2)));
        assert_eq!(merged(&put(0, 10, 1), &put(0, 10, 2), 99), None);
    }
}
