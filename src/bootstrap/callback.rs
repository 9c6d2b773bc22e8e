//! The caller's own exchange.

use std::fmt;
use std::time::Duration;

use super::{Bootstrap, BootstrapError};

/// A bootstrap over whatever the caller has: the all-gather of an MPI communicator, say, or of a framework.
pub struct Callback<F> {
    rank: usize,
    world_size: usize,
    exchange: F,
}

impl<F, E> Callback<F>
where
    F: FnMut(&[u8]) -> Result<Vec<Vec<u8>>, E> + Send,
    E: fmt::Display,
{
    /// `exchange` brings this rank's bytes and gives those of all ranks, in rank order. When it gives up is its own
    /// affair: the deadlines of calls are not passed on.
    pub fn new(rank: usize, world_size: usize, exchange: F) -> Self {
        Self { rank, world_size, exchange }
    }

    /// Bytes of other ranks can't be checked, but a wrong number or order of parts shows.
    fn check(&self, mine: &[u8], parts: &[Vec<u8>]) -> Result<(), String> {
        match parts.get(self.rank) {
            _ if parts.len() != self.world_size => {
                Err(format!("it gave {} parts for {} ranks", parts.len(), self.world_size))
            }
            Some(part) if part == mine => Ok(()),
            _ => Err(format!("part {} is not what rank {0} brought", self.rank)),
        }
    }
}

impl<F> fmt::Debug for Callback<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Callback");
        debug.field("rank", &self.rank).field("world_size", &self.world_size).finish_non_exhaustive()
    }
}

impl<F, E> Bootstrap for Callback<F>
where
    F: FnMut(&[u8]) -> Result<Vec<Vec<u8>>, E> + Send,
    E: fmt::Display,
{
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_gather(&mut self, mine: &[u8], _: Duration) -> Result<Vec<Vec<u8>>, BootstrapError> {
        let refuse = |reason| BootstrapError::Callback { reason };
        let parts = (self.exchange)(mine).map_err(|error| refuse(error.to_string()))?;
        self.check(mine, &parts).map_err(refuse)?;
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(parts: Result<&[&[u8]], &str>) -> Result<Vec<Vec<u8>>, BootstrapError> {
        let own = |parts: &[&[u8]]| parts.iter().map(|part| part.to_vec()).collect::<Vec<_>>();
        let mut callback = Callback::new(1, 2, |_: &[u8]| parts.map(own));
        callback.all_gather(b"me", Duration::ZERO)
    }

    #[test]
    fn what_the_callback_gives_is_checked() {
        assert_eq!(exchange(Ok(&[b"", b"me"])), Ok(vec![vec![], b"me".to_vec()]));
        for (given, reason) in [
            (Ok(&[b"me".as_slice()][..]), "1 parts for 2 ranks"),
            (Ok(&[b"me".as_slice(), b""][..]), "part 1 is not what rank 1 brought"),
            (Err("down"), "down"),
        ] {
            let error = exchange(given).unwrap_err();
            assert!(
                matches!(&error, BootstrapError::Callback { reason: r } if r.contains(reason)),
                "{error}"
            );
        }
    }
}
