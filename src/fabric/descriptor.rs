//! File descriptors through Unix sockets: how exported memory gets to another process of the node.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Sends a descriptor, and a number that says what it is. The descriptor stays open here.
///
/// # Errors
/// The other end is gone.
pub fn send_fd(socket: &UnixStream, descriptor: BorrowedFd<'_>, label: u64) -> io::Result<()> {
    let label = label.to_le_bytes();
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = loop {
        // Without the flag, a peer that is gone would end this process.
        match sendmsg(socket, &[IoSlice::new(&label)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            result => break result?,
        }
    };
    // The system takes so few bytes whole or not at all.
    if sent == label.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives what [`send_fd`] has sent.
///
/// # Errors
/// `TimedOut` at the deadline; the other end is gone, or has sent something else.
pub fn recv_fd(socket: &UnixStream, deadline: Instant) -> io::Result<(OwnedFd, u64)> {
    loop {
        wait_readable(socket, deadline)?;
        match receive(socket) {
            // Someone else was faster, or a signal came.
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result?.ok_or_else(|| io::ErrorKind::InvalidData.into()),
        }
    }
}

/// One message; none where it is not a descriptor with its label.
fn receive(socket: &UnixStream) -> Result<Option<(OwnedFd, u64)>, Errno> {
    let mut label = [0; size_of::<u64>()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = recvmsg(socket, &mut [IoSliceMut::new(&mut label)], &mut control, flags)?;
    // All are taken out, so that none stays open.
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors: Vec<OwnedFd> = descriptors.flatten().collect();
    let whole = message.bytes == label.len() && !message.flags.contains(ReturnFlags::CTRUNC);
    let only: Result<[OwnedFd; 1], _> = descriptors.try_into();
    Ok(only.ok().filter(|_| whole).map(|[descriptor]| (descriptor, u64::from_le_bytes(label))))
}

fn wait_readable(socket: &UnixStream, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Where even this is too long for the system, it wakes up and asks again.
        let left = Timespec::try_from(left.min(Duration::from_secs(3600))).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
            Ok(0) if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) | Err(Errno::INTR) => {}
            result => return result.map(|_| ()).map_err(io::Error::from),
        }
    }
}
