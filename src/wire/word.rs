//! Index words: what a rank publishes so that another may go on.

/// Bits of the index part; the generation takes the rest.
pub const INDEX_BITS: u32 = 48;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;

/// A ring cursor or an operation number: monotonic, modulo 2^48, never reset within a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Index(u64);

impl Index {
    /// The index congruent to `value`.
    pub const fn new(value: u64) -> Self {
        Self(value & INDEX_MASK)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The index `n` steps on.
    pub const fn advance(self, n: usize) -> Self {
        Self::new(self.0.wrapping_add(n as u64))
    }

    /// Steps from `earlier` to `self`. Cursors of one ring are never further apart than the ring is long.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.wrapping_sub(earlier.0) & INDEX_MASK
    }

    /// Whether `self` is `target` or beyond it, for indices less than 2^47 apart.
    pub const fn has_reached(self, target: Self) -> bool {
        self.since(target) < 1 << (INDEX_BITS - 1)
    }
}

/// What lies in memory: the generation in the upper 16 bits, the index in the lower 48. Generations start at
/// one, so zeroed memory belongs to none; words of another generation are stale and read as "nothing yet".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word(pub u64);

impl Word {
    /// The word that publishes `index` in `generation`.
    pub const fn new(generation: u16, index: Index) -> Self {
        Self((generation as u64) << INDEX_BITS | index.0)
    }

    /// The index, if the word belongs to `generation`.
    pub const fn index_in(self, generation: u16) -> Option<Index> {
        match self.0 >> INDEX_BITS == generation as u64 {
            true => Some(Index::new(self.0)),
            false => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_wrap() {
        let last = Index::new(u64::MAX);
        assert_eq!(last.advance(3).get(), 2);
        assert_eq!(last.advance(3).since(last), 3);
        assert!(last.advance(1).has_reached(last) && !last.has_reached(last.advance(1)));
    }

    #[test]
    fn words_of_other_generations_are_nothing() {
        let word = Word::new(3, Index::new(7));
        assert_eq!(word.index_in(3), Some(Index::new(7)));
        assert_eq!(word.index_in(2), None);
        assert_eq!(Word(0).index_in(1), None);
    }
}
