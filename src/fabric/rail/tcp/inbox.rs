//! What comes over one connection: data goes straight into the region.

#![allow(unsafe_code)]

use std::io::IoSliceMut;
use std::net::TcpStream;
use std::sync::Arc;

use rustix::io::{Errno, readv};

use super::frame::{Frame, FrameError, HEADER};
use crate::error::DeviceError;
use crate::fabric::mapped::Mapped;
use crate::fabric::rail::{Landed, Landing};

/// Bytes that a call reads beyond the data it expects: room for the headers that follow, a run of signals among them.
/// What turns out to be the beginning of more data is copied.
const AHEAD: usize = 12 * HEADER;

/// Bytes after which the rank hears of what has come, and the other connections have their turn: some pieces of a ring,
/// so that credit goes back while more is on its way.
const TURN: usize = 128 << 10;

/// The receiving end of a connection.
pub struct Inbox {
    landing: Arc<dyn Landing>,
    /// Its memory.
    region: Mapped,
    /// What has been read beyond the data under way; empty while that is not complete, less than a header otherwise.
    ahead: [u8; AHEAD],
    filled: usize,
    data: Option<Data>,
}

/// A posting under way.
struct Data {
    whole: Landed,
    /// What has still to come of it: where, and how much.
    target: usize,
    bytes: usize,
}

impl Data {
    fn of(whole: Landed) -> Self {
        Self { whole, target: whole.target, bytes: whole.bytes }
    }

    fn advance(&mut self, bytes: usize) {
        self.target += bytes;
        self.bytes -= bytes;
    }
}

/// What a turn has brought.
#[derive(Default)]
pub struct Received {
    /// Index words have been written.
    pub published: bool,
    /// The latest fence: its answer covers the earlier ones.
    pub fence: Option<u64>,
    /// The latest answer.
    pub answer: Option<u64>,
    /// Nothing more comes.
    pub end: Option<End>,
}

/// Why nothing more comes over a connection.
pub enum End {
    /// The peer has closed it, or its process is gone.
    Closed,
    /// The system says so.
    Failed(Errno),
    /// The peer sends what makes no sense.
    Garbage(FrameError),
    /// What it sends can't be published.
    Unpublished(DeviceError),
}

impl From<Errno> for End {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::CONNRESET | Errno::PIPE => Self::Closed,
            _ => Self::Failed(errno),
        }
    }
}

impl Inbox {
    /// The inbox of a connection whose peer puts into the memory of `landing`.
    pub fn new(landing: Arc<dyn Landing>) -> Self {
        Self { region: landing.memory(), landing, ahead: [0; AHEAD], filled: 0, data: None }
    }

    /// Receives what is there, a turn's bytes at most.
    ///
    /// # Safety
    /// The region is mapped, and nobody touches a posting's target before its word is written.
    pub unsafe fn turn(&mut self, stream: &TcpStream) -> Received {
        let mut received = Received::default();
        let mut taken = 0;
        while taken < TURN && received.end.is_none() {
            let room = self.room();
            // SAFETY: as promised to this function.
            match unsafe { self.read(stream) } {
                Ok(0) => received.end = Some(End::Closed),
                Ok(count) => {
                    taken += count;
                    // SAFETY: as promised to this function.
                    received.end = unsafe { self.settle(count, &mut received) }.err();
                    if count < room {
                        // Nothing was left.
                        break;
                    }
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => received.end = Some(errno.into()),
            }
        }
        received
    }

    /// What a call reads at most.
    fn room(&self) -> usize {
        AHEAD - self.filled + self.data.as_ref().map_or(0, |data| data.bytes)
    }

    /// The rest of the data and what follows it, in one call.
    ///
    /// # Safety
    /// As for [`Inbox::turn`].
    unsafe fn read(&mut self, stream: &TcpStream) -> Result<usize, Errno> {
        let ahead = IoSliceMut::new(&mut self.ahead[self.filled..]);
        let Some(data) = &self.data else { return readv(stream, &mut [ahead]) };
        // SAFETY: held by the region when the frame was decoded, and `advance` stays within; the rest as promised.
        let rest = unsafe { self.region.slice_mut(data.target, data.bytes) };
        readv(stream, &mut [IoSliceMut::new(rest), ahead])
    }

    /// Makes of `count` bytes read what they are.
    ///
    /// # Safety
    /// As for [`Inbox::turn`].
    unsafe fn settle(&mut self, count: usize, received: &mut Received) -> Result<(), End> {
        let direct = self.data.as_ref().map_or(0, |data| data.bytes.min(count));
        self.filled += count - direct;
        if let Some(data) = &mut self.data {
            data.advance(direct);
        }
        let mut rest = &self.ahead[..self.filled];
        loop {
            if let Some(data) = &mut self.data {
                let (now, later) = rest.split_at(data.bytes.min(rest.len()));
                // SAFETY: as in `read`.
                unsafe { self.region.slice_mut(data.target, now.len()) }.copy_from_slice(now);
                data.advance(now.len());
                rest = later;
            }
            if let Some(data) = self.data.take_if(|data| data.bytes == 0) {
                self.landing.publish(&data.whole).map_err(End::Unpublished)?;
                received.published = true;
            }
            let Some((header, later)) = rest.split_first_chunk() else { break };
            rest = later;
            match Frame::decode(header, &self.region).map_err(End::Garbage)? {
                Frame::Posting { target, bytes, word, value } => {
                    self.data = Some(Data::of(Landed { target, bytes, word, value }));
                }
                Frame::Fence(number) => received.fence = Some(number),
                Frame::Answer(number) => received.answer = Some(number),
                Frame::Goodbye => return Err(End::Closed),
            }
        }
        let (from, left) = (self.filled - rest.len(), rest.len());
        self.ahead.copy_within(from..self.filled, 0);
        self.filled = left;
        Ok(())
    }
}
