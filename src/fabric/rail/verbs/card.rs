//! What a rank tells its peers, so that they can write to it.

use bytemuck::{Pod, Zeroable, bytes_of, cast_slice, pod_collect_to_vec, try_pod_read_unaligned};

use super::error::VerbsError;

/// The first bytes of a card.
const MAGIC: [u8; 4] = *b"rhvc";

/// Raised when the layout changes.
const VERSION: u32 = 1;

/// A card's beginning. As all ranks of a world, it has the byte order of x86 and ARM; `version` tells of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: u32,
    rank: u32,
    peers: u32,
    pairs: u32,
    end: End,
}

/// What all peers need to know of a rank's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct End {
    /// Number of the first packet on each queue pair.
    pub(super) first_packet: u32,
    /// The region's key.
    pub(super) key: u32,
    /// Where the region begins, in two halves.
    pub(super) base: [u32; 2],
    /// Its size, in two halves.
    pub(super) bytes: [u32; 2],
    pub(super) gid: [u8; 16],
    /// InfiniBand's local identifier.
    pub(super) lid: u16,
    /// `enum ibv_mtu`.
    pub(super) mtu: u8,
    pub(super) is_ethernet: u8,
    /// Whether a signal is to wake the rank's thread.
    pub(super) wakes: u32,
}

impl End {
    pub(super) fn base(&self) -> u64 {
        bytemuck::cast(self.base)
    }

    pub(super) fn bytes(&self) -> u64 {
        bytemuck::cast(self.bytes)
    }
}

/// What a peer's card says to one rank.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Card {
    pub(super) end: End,
    /// Numbers of the queue pairs that are meant for the reader.
    pub(super) pairs: Vec<u32>,
}

/// The card of `rank`; for each peer its queue pairs, of the same number.
pub(super) fn write(rank: usize, end: End, peers: &[(usize, Vec<u32>)]) -> Vec<u8> {
    let pairs = peers.first().map_or(0, |(_, pairs)| pairs.len()) as u32;
    let (rank, count) = (rank as u32, peers.len() as u32);
    let header = Header { magic: MAGIC, version: VERSION, rank, peers: count, pairs, end };
    let rows =
        peers.iter().flat_map(|(rank, pairs)| std::iter::once(*rank as u32).chain(pairs.iter().copied()));
    let rows: Vec<u32> = rows.collect();
    [bytes_of(&header), cast_slice(&rows)].concat()
}

/// What the card of `rank` says to `reader`.
pub(super) fn read(card: &[u8], rank: usize, reader: usize) -> Result<Card, VerbsError> {
    let refused = |problem: String| VerbsError::Card { rank, problem };
    let (header, rows) = card.split_at(card.len().min(size_of::<Header>()));
    let header: Header =
        try_pod_read_unaligned(header).map_err(|_| refused(format!("{} bytes are too few", card.len())))?;
    if header.magic != MAGIC {
        return Err(refused("it is something else".into()));
    }
    if header.version != VERSION {
        return Err(refused(format!("it has version {}, {VERSION} expected", header.version)));
    }
    if header.rank as usize != rank {
        return Err(refused(format!("it is that of rank {}", header.rank)));
    }
    let row = 1 + u128::from(header.pairs);
    let expected = 4 * row * u128::from(header.peers);
    if rows.len() as u128 != expected {
        return Err(refused(format!("{} bytes of queue pairs, {expected} expected", rows.len())));
    }
    let end = header.end;
    if header.pairs == 0 || !(1..=5).contains(&end.mtu) || end.base().checked_add(end.bytes()).is_none() {
        return Err(refused("its numbers make no sense".into()));
    }
    let rows: Vec<u32> = pod_collect_to_vec(rows);
    let own = rows.chunks_exact(row as usize).find(|row| row[0] as usize == reader);
    let own = own.ok_or_else(|| refused(format!("it has no queue pairs for rank {reader}")))?;
    Ok(Card { end, pairs: own[1..].to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end() -> End {
        End {
            first_packet: 77,
            key: 5,
            base: bytemuck::cast(1u64 << 40),
            bytes: bytemuck::cast(1u64 << 33),
            gid: [7; 16],
            lid: 3,
            mtu: 4,
            is_ethernet: 1,
            wakes: 1,
        }
    }

    fn card() -> Vec<u8> {
        write(3, end(), &[(1, vec![10, 11]), (5, vec![12, 13])])
    }

    fn problem(card: &[u8], reader: usize) -> String {
        read(card, 3, reader).unwrap_err().to_string()
    }

    #[test]
    fn a_reader_finds_its_own_queue_pairs() {
        let read = read(&card(), 3, 5).unwrap();
        assert_eq!(read, Card { end: end(), pairs: vec![12, 13] });
        assert_eq!((read.end.base(), read.end.bytes()), (1 << 40, 1 << 33));
    }

    #[test]
    fn what_is_no_card_is_refused() {
        let (good, changed) = (card(), |at: usize, to: u8| {
            let mut card = card();
            card[at] = to;
            card
        });
        assert!(problem(&[], 5).contains("rank 3 can't be used: 0 bytes are too few"));
        assert!(problem(&good[..good.len() - 4], 5).contains("20 bytes of queue pairs, 24 expected"));
        assert!(problem(&[&good[..], &[0; 4]].concat(), 5).contains("28 bytes"));
        assert!(problem(&good, 2).contains("no queue pairs for rank 2"));
        assert!(problem(&changed(0, 0), 5).contains("something else"));
        assert!(problem(&changed(4, 9), 5).contains("version 9"));
        assert!(problem(&changed(8, 4), 5).contains("that of rank 4"));
        assert!(problem(&changed(12, 255), 5).contains("expected"));
        let no_mtu = write(3, End { mtu: 0, ..end() }, &[(5, vec![1])]);
        assert!(problem(&no_mtu, 5).contains("no sense"));
        let around = write(3, End { base: [u32::MAX; 2], ..end() }, &[(5, vec![1])]);
        assert!(problem(&around, 5).contains("no sense"));
    }
}
