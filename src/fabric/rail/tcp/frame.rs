//! What goes over a connection: frames, each a header and, where it is a posting, its data.

use crate::fabric::mapped::Mapped;

/// Bytes of a header: kind, target, bytes, word, value, each 8 bytes, little-endian.
pub const HEADER: usize = 40;

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// `bytes` bytes follow, for `target` in the receiver's region; `value` is for the index word at `word` after that.
    Posting { target: usize, bytes: usize, word: usize, value: u64 },
    /// Asks for an [`Frame::Answer`] once all before it has landed.
    Fence(u64),
    /// All before the fence of this number has landed.
    Answer(u64),
    /// Nothing follows: the sender leaves.
    Goodbye,
}

/// A header that no rank of this world can have meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("what it sends is no frame: kind {0:#018x}")]
    Kind(u64),
    #[error("its posting of {bytes} bytes at {target} is not within the {region} bytes of the region")]
    Target { target: u64, bytes: u64, region: usize },
    #[error("its posting names a word at {word}, and the region of {region} bytes has none there")]
    Word { word: u64, region: usize },
}

/// Not small numbers: what is out of step, or no frame at all, hardly looks like one.
mod kind {
    pub const POSTING: u64 = u64::from_le_bytes(*b"posting\n");
    pub const FENCE: u64 = u64::from_le_bytes(*b"fence  \n");
    pub const ANSWER: u64 = u64::from_le_bytes(*b"answer \n");
    pub const GOODBYE: u64 = u64::from_le_bytes(*b"goodbye\n");
}

impl Frame {
    /// The header.
    pub fn encode(&self) -> [u8; HEADER] {
        let words = match *self {
            Self::Posting { target, bytes, word, value } => {
                [kind::POSTING, target as u64, bytes as u64, word as u64, value]
            }
            Self::Fence(number) => [kind::FENCE, 0, 0, 0, number],
            Self::Answer(number) => [kind::ANSWER, 0, 0, 0, number],
            Self::Goodbye => [kind::GOODBYE, 0, 0, 0, 0],
        };
        let mut header = [0; HEADER];
        for (to, word) in header.as_chunks_mut().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        header
    }

    /// What `header` says. A posting's target lies in `region`, and so does its word.
    pub fn decode(header: &[u8; HEADER], region: &Mapped) -> Result<Self, FrameError> {
        let mut words = [0; HEADER / 8];
        for (word, from) in words.iter_mut().zip(header.as_chunks().0) {
            *word = u64::from_le_bytes(*from);
        }
        let [kind, target, bytes, word, value] = words;
        match kind {
            kind::POSTING => Self::posting(target, bytes, word, value, region),
            kind::FENCE => Ok(Self::Fence(value)),
            kind::ANSWER => Ok(Self::Answer(value)),
            kind::GOODBYE => Ok(Self::Goodbye),
            _ => Err(FrameError::Kind(kind)),
        }
    }

    fn posting(target: u64, bytes: u64, word: u64, value: u64, region: &Mapped) -> Result<Self, FrameError> {
        // What is no `usize` is in no region.
        let [at, len, index] = [target, bytes, word].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        if !region.holds(at, len) {
            return Err(FrameError::Target { target, bytes, region: region.bytes() });
        }
        if region.word(index).is_none() {
            return Err(FrameError::Word { word, region: region.bytes() });
        }
        Ok(Self::Posting { target: at, bytes: len, word: index, value })
    }
}
