//! What goes over a connection once both ends know each other: numbers of 64 bits, little-endian, and bytes. No length
//! that comes from outside is allocated before it was held against a limit, nor faster than its bytes arrive.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::error::{Agreed, BootstrapError, Operation, Step};

/// The most bytes that all ranks together bring to one gather.
pub const MAX_GATHER: u64 = 64 << 20;

/// The longest wait there is; longer ones would overflow the clock.
const MAX_DEADLINE: Duration = Duration::from_secs(366 * 24 * 3600);

/// When a wait of `deadline` that begins now ends.
pub(super) fn end_of(deadline: Duration) -> Instant {
    Instant::now() + deadline.min(MAX_DEADLINE)
}

/// What is left until `end`; none when it has passed.
pub(super) fn time_left(end: Instant) -> Option<Duration> {
    end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
}

/// A stream whose reads and writes end at `end`, all of them together: a peer that sends a byte now and then gains
/// nothing.
pub(super) struct Timed<'a> {
    pub stream: &'a TcpStream,
    pub end: Instant,
}

impl Timed<'_> {
    /// Repeats `transfer` with what time is left until it ends otherwise than by a timeout.
    fn until_end(
        &mut self,
        mut transfer: impl FnMut(&mut &TcpStream, Duration) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            let left = time_left(self.end).ok_or(io::ErrorKind::TimedOut)?;
            match transfer(&mut self.stream, left) {
                Err(error) if is_timeout(&error) => {}
                result => return result,
            }
        }
    }
}

/// Systems differ in what a timeout is called.
fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.until_end(|stream, left| {
            stream.set_read_timeout(Some(left))?;
            stream.read(buffer)
        })
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.until_end(|stream, left| {
            stream.set_write_timeout(Some(left))?;
            stream.write(bytes)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed: {what}"))
}

/// Reads `len` bytes, which the caller has held against a limit.
fn read_bytes(from: &mut impl Read, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match from.take(len).read_to_end(&mut bytes)? as u64 {
        got if got == len => Ok(bytes),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

pub(super) fn encode(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(super) fn decode<const N: usize>(bytes: &[u8; N]) -> impl Iterator<Item = u64> {
    words_of(bytes)
}

fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What a rank brings to a step. The payload follows, unless its size alone exceeds [`MAX_GATHER`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Contribution {
    pub step: Step,
    /// The deadline of the rank's call, and what is left of it.
    pub deadline: Duration,
    pub left: Duration,
    /// Size of the payload.
    pub bytes: u64,
}

impl Contribution {
    const BYTES: usize = 40;

    pub fn write(&self, payload: &[u8], to: &mut impl Write) -> io::Result<()> {
        let times = [millis(self.deadline), millis(self.left)];
        to.write_all(&encode(&[
            self.step.number,
            self.step.operation as u64,
            times[0],
            times[1],
            self.bytes,
        ]))?;
        if self.has_payload() { to.write_all(payload) } else { Ok(()) }
    }

    pub fn has_payload(&self) -> bool {
        self.bytes <= MAX_GATHER
    }

    /// Reads what precedes the payload; none if the other end closes before it.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut bytes = [0; Self::BYTES];
        // A close between two contributions is a farewell, one within is a loss.
        if from.read(&mut bytes[..1])? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut bytes[1..])?;
        Self::parse(&bytes).map(Some).ok_or_else(|| malformed("no such operation"))
    }

    fn parse(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut words = decode(bytes);
        let mut next = || words.next();
        let (number, operation) = (next()?, Operation::from_code(next()?)?);
        let (deadline, left) = (Duration::from_millis(next()?), Duration::from_millis(next()?));
        Some(Self { step: Step { operation, number }, deadline, left, bytes: next()? })
    }

    /// Reads the payload, or leaves it behind if there is no `room` for it.
    pub fn read_payload(&self, room: u64, from: &mut impl Read) -> io::Result<Vec<u8>> {
        match self.bytes {
            bytes if !self.has_payload() => {
                debug_assert!(bytes > room);
                Ok(Vec::new())
            }
            bytes if bytes <= room => read_bytes(from, bytes),
            bytes => match io::copy(&mut from.take(bytes), &mut io::sink())? {
                skipped if skipped == bytes => Ok(Vec::new()),
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            },
        }
    }
}

/// How a step ends.
pub(super) type Outcome = Result<Vec<Vec<u8>>, BootstrapError>;

const PARTS: u64 = 1;
const FAILED: u64 = 2;

/// A step's end, as all ranks get it.
pub(super) fn encode_outcome(outcome: &Outcome) -> Vec<u8> {
    match outcome {
        Ok(parts) => {
            let payload: usize = parts.iter().map(Vec::len).sum();
            let mut bytes = encode(&[PARTS, (8 * parts.len() + payload) as u64]);
            bytes.reserve_exact(8 * parts.len() + payload);
            parts.iter().for_each(|part| bytes.extend((part.len() as u64).to_le_bytes()));
            parts.iter().for_each(|part| bytes.extend(part));
            bytes
        }
        Err(error) => {
            let body = encode_error(error);
            let mut bytes = encode(&[FAILED, body.len() as u64]);
            bytes.extend(body);
            bytes
        }
    }
}

/// Reads a step's end in a world of `world_size` ranks.
pub(super) fn read_outcome(from: &mut impl Read, world_size: usize) -> io::Result<Outcome> {
    let mut header = [0; 16];
    from.read_exact(&mut header)?;
    let mut words = decode(&header);
    let (kind, len) = (words.next().unwrap_or(0), words.next().unwrap_or(0));
    match kind {
        PARTS => read_parts(from, world_size, len).map(Ok),
        FAILED if len <= max_error(world_size) => {
            let body = read_bytes(from, len)?;
            decode_error(&body).map(Err).ok_or_else(|| malformed("no such error"))
        }
        _ => Err(malformed("no such frame")),
    }
}

fn read_parts(from: &mut impl Read, world_size: usize, len: u64) -> io::Result<Vec<Vec<u8>>> {
    let lengths = read_bytes(from, 8 * world_size as u64)?;
    let lengths: Vec<u64> = words_of(&lengths).collect();
    let total = lengths.iter().try_fold(0u64, |sum, &len| sum.checked_add(len));
    match total {
        Some(total) if total <= MAX_GATHER && len == total + 8 * world_size as u64 => {
            lengths.into_iter().map(|len| read_bytes(from, len)).collect()
        }
        _ => Err(malformed("parts that exceed their limit")),
    }
}

/// The most bytes of an error: one that names all ranks.
pub(super) fn max_error(world_size: usize) -> u64 {
    8 * (world_size as u64 + 8)
}

const MISSING: u64 = 1;
const MISMATCH: u64 = 2;
const DUPLICATE: u64 = 3;
const LOST: u64 = 4;
const TOO_LARGE: u64 = 5;

/// Errors that go from rank 0 to the others.
pub(super) fn encode_error(error: &BootstrapError) -> Vec<u8> {
    match error {
        BootstrapError::Missing { ranks, step, after } => {
            let mut words = vec![MISSING, step.operation as u64, step.number, millis(*after)];
            words.extend(ranks.iter().map(|&rank| rank as u64));
            encode(&words)
        }
        BootstrapError::Mismatch { rank, peer, what, ours, theirs } => {
            encode(&[MISMATCH, *rank as u64, *peer as u64, *what as u64, *ours, *theirs])
        }
        BootstrapError::Duplicate { rank } => encode(&[DUPLICATE, *rank as u64]),
        BootstrapError::TooLarge { bytes, limit } => encode(&[TOO_LARGE, *bytes, *limit]),
        BootstrapError::Lost { rank } => encode(&[LOST, *rank as u64]),
        // Whatever else befalls rank 0 is its own, and ends the store.
        _ => encode(&[LOST, 0]),
    }
}

pub(super) fn decode_error(bytes: &[u8]) -> Option<BootstrapError> {
    let mut words = words_of(bytes);
    let code = words.next()?;
    let mut next = || words.next();
    Some(match code {
        MISSING => {
            let (operation, number) = (Operation::from_code(next()?)?, next()?);
            let (step, after) = (Step { operation, number }, Duration::from_millis(next()?));
            BootstrapError::Missing { ranks: words.map(|rank| rank as usize).collect(), step, after }
        }
        MISMATCH => {
            let (rank, peer, what) = (next()? as usize, next()? as usize, Agreed::from_code(next()?)?);
            BootstrapError::Mismatch { rank, peer, what, ours: next()?, theirs: next()? }
        }
        DUPLICATE => BootstrapError::Duplicate { rank: next()? as usize },
        LOST => BootstrapError::Lost { rank: next()? as usize },
        TOO_LARGE => BootstrapError::TooLarge { bytes: next()?, limit: next()? },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STEP: Step = Step { operation: Operation::Gather, number: 7 };

    fn errors() -> Vec<BootstrapError> {
        vec![
            BootstrapError::Missing { ranks: vec![1, 4], step: STEP, after: Duration::from_millis(1500) },
            BootstrapError::Mismatch { rank: 2, peer: 0, what: Agreed::Layout, ours: 5, theirs: u64::MAX },
            BootstrapError::Duplicate { rank: 3 },
            BootstrapError::Lost { rank: 9 },
            BootstrapError::TooLarge { bytes: MAX_GATHER + 1, limit: MAX_GATHER },
        ]
    }

    #[test]
    fn outcomes_arrive_as_they_were() {
        let parts = vec![b"one".to_vec(), vec![], vec![7; 70_000]];
        for outcome in errors().into_iter().map(Err).chain([Ok(parts)]) {
            let bytes = encode_outcome(&outcome);
            assert_eq!(read_outcome(&mut &bytes[..], 3).unwrap(), outcome);
            for cut in [0, 1, 15, 16, bytes.len() - 1] {
                assert!(read_outcome(&mut &bytes[..cut], 3).is_err());
            }
        }
    }

    #[test]
    fn contributions_arrive_as_they_were() {
        let (deadline, left) = (Duration::from_secs(5), Duration::from_millis(4999));
        let sent = Contribution { step: STEP, deadline, left, bytes: 4 };
        let mut bytes = Vec::new();
        sent.write(b"four", &mut bytes).unwrap();
        let from = &mut &bytes[..];
        let got = Contribution::read(from).unwrap().unwrap();
        assert_eq!((got, got.read_payload(4, from).unwrap()), (sent, b"four".to_vec()));
        assert_eq!(Contribution::read(from).unwrap(), None);
        assert!(Contribution::read(&mut &bytes[..9]).is_err());
        // What has no room is left behind, and what follows is still found.
        let from = &mut &bytes[Contribution::BYTES..];
        assert_eq!((got.read_payload(3, from).unwrap(), from.len()), (vec![], 0));
    }

    #[test]
    fn lengths_from_outside_are_held_against_limits() {
        for (kind, len) in [(PARTS, u64::MAX), (FAILED, u64::MAX), (FAILED, max_error(2) + 1), (3, 0), (0, 0)]
        {
            let bytes = encode(&[kind, len, u64::MAX, 2, 3]);
            assert_eq!(read_outcome(&mut &bytes[..], 2).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        // A length within the limit costs no more than the bytes that come.
        let bytes = encode(&[PARTS, 16 + MAX_GATHER, MAX_GATHER, 0]);
        assert_eq!(read_outcome(&mut &bytes[..], 2).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_and_no_more(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u64..4) {
            let mut framed = encode(&[kind, bytes.len() as u64]);
            framed.extend(&bytes);
            let _ = read_outcome(&mut &framed[..], 3);
            let _ = read_outcome(&mut &bytes[..], 3);
            let _ = Contribution::read(&mut &bytes[..]);
            let _ = decode_error(&bytes);
        }
    }
}
