//! The meeting of a reset, as rank 0 holds it: it alone decides whether all have come, so all hear the same.

use std::time::{Duration, Instant};

use super::Message;

/// How much longer than the deadline the others wait for rank 0 to say what the meeting came to.
pub(super) const GRACE: Duration = Duration::from_millis(500);

/// A rank's coming.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrival {
    pub attempt: u64,
    pub generation: u16,
    pub deadline: Duration,
}

#[derive(Default)]
pub(super) struct Meeting {
    /// By rank.
    arrivals: Vec<Option<Arrival>>,
    /// When the first came, and how long it waits.
    first: Option<(Instant, Duration)>,
    /// Ranks that those who came know to be gone.
    gone: Vec<usize>,
}

impl Meeting {
    pub fn arrive(&mut self, world: usize, rank: usize, arrival: Arrival, gone: Vec<usize>) {
        self.arrivals.resize(world, None);
        self.arrivals[rank] = Some(arrival);
        self.first.get_or_insert((Instant::now(), arrival.deadline));
        self.gone.extend(gone);
        self.gone.sort_unstable();
        self.gone.dedup();
    }

    /// When those who came give up.
    pub fn deadline(&self) -> Option<Instant> {
        self.first.map(|(since, deadline)| since + deadline)
    }

    /// What is to be said to whom, if the meeting is over: all have come, or some never will, or it has taken too long.
    pub fn end(&mut self, closed: &[bool]) -> Vec<(usize, Message)> {
        let Some((since, deadline)) = self.first else { return Vec::new() };
        let absent: Vec<usize> =
            (0..self.arrivals.len()).filter(|&rank| self.arrivals[rank].is_none()).collect();
        let gone = |rank: &usize| closed[*rank] || self.gone.contains(rank);
        let gone: Vec<usize> = (0..closed.len()).filter(gone).collect();
        let after = since.elapsed().min(deadline);
        let missing = match (absent.is_empty() && gone.is_empty(), gone.is_empty()) {
            (true, _) => self.out_of_step(),
            (_, false) => gone,
            _ if after == deadline => absent,
            _ => return Vec::new(),
        };
        let arrived =
            self.arrivals.iter().enumerate().filter_map(|(rank, arrival)| Some((rank, (*arrival)?)));
        let message = |(rank, Arrival { attempt, .. })| {
            (rank, Message::Met { attempt, missing: missing.clone(), after })
        };
        let ended = arrived.map(message).collect();
        *self = Self::default();
        ended
    }

    /// Ranks of another generation than the first: they have missed a reset, and can't be brought back by this one.
    fn out_of_step(&self) -> Vec<usize> {
        let generation = |rank: usize| self.arrivals[rank].map(|arrival| arrival.generation);
        (0..self.arrivals.len()).filter(|&rank| generation(rank) != generation(0)).collect()
    }
}
