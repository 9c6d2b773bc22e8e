//! Lines that say whose they are.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

/// A line that is longer goes on in the next one.
const MAX_LINE: usize = 1 << 20;

/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// Tells those who read what ranks write that no rank is left. From then on they read what is there, and wait for
/// nothing more: a process that a rank has left behind may hold the other end for ever.
#[derive(Clone)]
pub struct Over(Arc<PipeReader>);

impl Over {
    /// It is over when the second is dropped.
    pub fn new() -> io::Result<(Self, PipeWriter)> {
        let (reader, writer) = io::pipe()?;
        Ok((Self(Arc::new(reader)), writer))
    }
}

/// Where lines go.
#[derive(Debug, Clone, Copy)]
pub enum Stream {
    /// The launcher's stdout.
    Stdout,
    /// The launcher's stderr.
    Stderr,
}

impl Stream {
    /// Writes all of it with nobody's in between.
    fn write(self, lines: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(lines)?;
                stdout.flush()
            }
            Self::Stderr => io::stderr().lock().write_all(lines),
        }
    }
}

/// Starts a thread that writes what comes out of `from`, line by line, with `[rank] ` before each. It ends when all is
/// written, or when nobody reads it: then the rank gets what it would get without a launcher in between.
pub fn forward(
    from: impl Read + AsFd + Send + 'static,
    to: Stream,
    rank: usize,
    over: &Over,
) -> JoinHandle<()> {
    let over = over.clone();
    thread::spawn(move || drop(copy(from, to, Lines::new(rank), &over)))
}

fn copy(mut from: impl Read + AsFd, to: Stream, mut lines: Lines, over: &Over) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    while comes_more(from.as_fd(), over)? {
        match from.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => to.write(&lines.take(&chunk[..count]))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    to.write(&lines.finish())
}

/// Waits until there is something to read (or the end of it), or it is over and there is nothing.
fn comes_more(from: BorrowedFd<'_>, over: &Over) -> io::Result<bool> {
    let awaited = |descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN);
    let mut both = [awaited(from), awaited(over.0.as_fd())];
    retry_on_intr(|| poll(&mut both, None))?;
    if both[0].revents().is_empty() {
        // What a rank wrote last may have come while this thread woke up.
        retry_on_intr(|| poll(&mut both[..1], Some(&Timespec::default())))?;
    }
    Ok(!both[0].revents().is_empty())
}

/// Bytes made into lines. They need not be text.
struct Lines {
    prefix: Vec<u8>,
    /// Of the line that has not ended yet.
    begun: Vec<u8>,
}

impl Lines {
    fn new(rank: usize) -> Self {
        Self { prefix: format!("[{rank}] ").into_bytes(), begun: Vec::new() }
    }

    /// The lines that `bytes` bring to an end.
    fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut whole = Vec::with_capacity(bytes.len());
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.begun.extend_from_slice(piece);
            if piece.ends_with(b"\n") || self.begun.len() >= MAX_LINE {
                whole.extend(self.finish());
            }
        }
        whole
    }

    /// The line that has begun, if any, with an end.
    fn finish(&mut self) -> Vec<u8> {
        if self.begun.is_empty() {
            return Vec::new();
        }
        let end: &[u8] = if self.begun.ends_with(b"\n") { b"" } else { b"\n" };
        let line = [&self.prefix[..], &self.begun, end].concat();
        self.begun.clear();
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_and_prefixed() {
        let mut lines = Lines::new(7);
        assert_eq!(lines.take(b"a"), b"");
        assert_eq!(lines.take(b"b\n\nc\xff\0\nd"), b"[7] ab\n[7] \n[7] c\xff\0\n");
        assert_eq!(lines.finish(), b"[7] d\n");
        assert_eq!(lines.finish(), b"");
    }

    #[test]
    fn a_line_that_is_too_long_goes_on_in_the_next() {
        let mut lines = Lines::new(0);
        let long = vec![b'x'; MAX_LINE];
        assert_eq!(lines.take(&long).len(), MAX_LINE + 5);
        assert_eq!(lines.take(b"y\n"), b"[0] y\n");
    }
}
