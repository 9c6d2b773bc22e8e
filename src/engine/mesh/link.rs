//! One connection: messages with their length before them.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;

use super::Message;
use crate::engine::completion::lock;

/// The longest message; a longer one is no message of ours.
const MAX_MESSAGE: usize = 80 << 20;

/// Bytes read at a time.
const READ: usize = 64 << 10;

pub(super) struct Link {
    socket: TcpStream,
    /// What has not gone yet.
    unsent: Mutex<Vec<u8>>,
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Link {
    pub fn new(socket: TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, unsent: Mutex::default() })
    }

    /// The address of this end.
    pub fn own_address(&self) -> Option<IpAddr> {
        self.socket.local_addr().ok().map(|address| address.ip())
    }

    /// Whether all of it went. The rest is kept, for [`Link::flush`].
    pub fn send(&self, message: &Message) -> bool {
        let body = postcard::to_stdvec(message).expect("messages can be written");
        let mut unsent = lock(&self.unsent);
        unsent.extend_from_slice(&(body.len() as u32).to_le_bytes());
        unsent.extend_from_slice(&body);
        self.push(&mut unsent)
    }

    /// Whether all that was kept has gone.
    pub fn flush(&self) -> bool {
        self.push(&mut lock(&self.unsent))
    }

    pub fn has_unsent(&self) -> bool {
        !lock(&self.unsent).is_empty()
    }

    fn push(&self, unsent: &mut Vec<u8>) -> bool {
        let mut sent = 0;
        while sent < unsent.len() {
            match (&self.socket).write(&unsent[sent..]) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Nobody is there to read it; the reading side finds out.
                Err(_) => sent = unsent.len(),
            }
        }
        unsent.drain(..sent);
        unsent.is_empty()
    }
}

/// The reading side of a link.
#[derive(Default)]
pub(super) struct Inbox {
    bytes: Vec<u8>,
}

impl Inbox {
    /// What has come; an error when nothing more will.
    pub fn read(&mut self, link: &Link) -> io::Result<Vec<Message>> {
        let held = self.bytes.len();
        self.bytes.resize(held + READ, 0);
        let read = (&link.socket).read(&mut self.bytes[held..]);
        self.bytes.truncate(held + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            result => drop(result?),
        }
        let mut messages = Vec::new();
        while let Some(message) = self.next()? {
            messages.push(message);
        }
        Ok(messages)
    }

    fn next(&mut self) -> io::Result<Option<Message>> {
        let Some((head, rest)) = self.bytes.split_first_chunk() else { return Ok(None) };
        let length = u32::from_le_bytes(*head) as usize;
        if length > MAX_MESSAGE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let message = postcard::from_bytes(body).map_err(|_| io::ErrorKind::InvalidData)?;
        self.bytes.drain(..head.len() + length);
        Ok(Some(message))
    }
}
