//! Hop 1 over TCP: rings of chunks with credit, as fast as they go, from one process to another.
//!
//! `hop1 serve ADDRESS` receives and `hop1 send ADDRESS` sends, each in a network namespace of its own: `ci/hop1` does
//! that beside iperf3. Without either, both are threads over loopback.

#![allow(unsafe_code)]

#[cfg(target_os = "linux")]
mod linux {
    use std::error::Error;
    use std::io;
    use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Condvar, Mutex};
    use std::thread;
    use std::time::{Duration, Instant};

    use clap::{Parser, Subcommand};
    use railhop::Network;
    use railhop::fabric::mapped::Mapped;
    use railhop::fabric::rail::{Listener, NetworkRail, Rail, RailError, TcpPeer, TcpRail};
    use railhop::wire::posting::Posting;
    use railhop::wire::word::{Index, Word};

    /// A BF16 token of 7168 elements.
    const SLOT: usize = 14336;
    const SLOTS: u64 = Network::RING_SLOTS as u64;
    /// Slots that are posted at once.
    const CHUNK: u64 = Network::CHUNK_TOKENS as u64;
    const RING: usize = SLOT * SLOTS as usize;

    /// Words have a line each.
    const LINE: usize = 64;

    /// Nothing takes as long.
    const LIMIT: Duration = Duration::from_secs(20);

    #[derive(Parser)]
    struct Options {
        #[command(subcommand)]
        role: Option<Role>,
        /// Run small, to see that it works.
        #[arg(long)]
        test: bool,
        /// What cargo says to benchmarks.
        #[arg(long, hide = true)]
        bench: bool,
    }

    #[derive(Subcommand)]
    enum Role {
        /// Receive from one sender.
        Serve {
            address: SocketAddr,
            /// Rings, each with a connection of its own.
            #[arg(long, default_value_t = 2)]
            streams: usize,
        },
        /// Send, and print how fast as JSON.
        Send {
            address: SocketAddr,
            /// Rings, each with a connection of its own.
            #[arg(long, default_value_t = 2)]
            streams: usize,
            #[arg(long, default_value_t = 5.0)]
            seconds: f64,
        },
    }

    /// Wakes the thread that works on the rings.
    #[derive(Default)]
    struct Bell {
        state: Mutex<Rung>,
        rings: Condvar,
    }

    #[derive(Default, Clone, Copy)]
    struct Rung {
        times: u64,
        lost: bool,
    }

    impl Bell {
        fn ring(&self, lost: bool) {
            let mut state = self.state.lock().unwrap();
            state.times += 1;
            state.lost |= lost;
            drop(state);
            self.rings.notify_one();
        }

        fn now(&self) -> Rung {
            *self.state.lock().unwrap()
        }

        /// Waits until it has rung since `before`.
        fn wait(&self, before: Rung) {
            let silent = |state: &mut Rung| state.times == before.times;
            let state = self.state.lock().unwrap();
            let waited = self.rings.wait_timeout_while(state, LIMIT, silent).unwrap();
            assert!(!waited.1.timed_out(), "nothing has moved for {LIMIT:?}");
        }
    }

    impl Listener for Bell {
        fn signalled(&self) {
            self.ring(false);
        }

        fn lost(&self, peer: usize, failure: Option<RailError>) {
            assert_eq!(failure, None, "rank {peer} is lost");
            self.ring(true);
        }
    }

    /// One rank of the two.
    struct End {
        rail: TcpRail,
        region: Mapped,
        bell: Arc<Bell>,
        peer: usize,
    }

    /// Memory that is never freed.
    fn leaked(bytes: usize) -> Mapped {
        let words: Vec<AtomicU64> = (0..bytes / 8).map(|_| AtomicU64::new(0)).collect();
        // SAFETY: it is leaked, and nobody has references to it but to atomics.
        unsafe { Mapped::new(words.leak().as_mut_ptr().cast(), bytes) }
    }

    fn ring(stream: usize) -> usize {
        stream * RING
    }

    impl End {
        fn new(rank: usize, connections: Vec<TcpStream>) -> io::Result<Self> {
            let (bell, streams) = (Arc::new(Bell::default()), connections.len());
            let (source, region) = (leaked(ring(streams)), leaked(ring(streams) + LINE * streams));
            let peer = TcpPeer { rank: 1 - rank, connections };
            // SAFETY: the memories are never freed; a slot is sent again when it is credited, which is after it left.
            let rail = unsafe { TcpRail::new(rank, source, Arc::new(region), vec![peer], bell.clone()) }?;
            Ok(Self { rail, region, bell, peer: 1 - rank })
        }

        /// The index at the peer's end of a ring.
        fn index(&self, word: usize) -> u64 {
            let word = self.region.word(word).expect("a word in the region").load(Ordering::Acquire);
            Word(word).index_in(1).unwrap_or(Index::new(0)).get()
        }

        /// `slots` slots of a ring, ending before `index`; or credit.
        fn posting(&self, streams: usize, stream: usize, index: u64, slots: u64) -> Posting {
            let at = ring(stream) + (index - slots) as usize % SLOTS as usize * SLOT;
            Posting {
                peer: self.peer,
                queue: stream,
                source: at,
                target: at,
                bytes: slots as usize * SLOT,
                word: ring(streams) + LINE * stream,
                completion: (slots > 0).then_some(stream),
                value: Word::new(1, Index::new(index)),
            }
        }

        /// Credits what comes until the sender is gone.
        fn serve(mut self, streams: usize) -> Result<(), RailError> {
            let mut heads = vec![0; streams];
            let mut credits = Vec::new();
            loop {
                let before = self.bell.now();
                for (stream, head) in heads.iter_mut().enumerate() {
                    let tail = self.index(ring(streams) + LINE * stream);
                    if tail > *head {
                        *head = tail;
                        credits.push(self.posting(streams, stream, tail, 0));
                    }
                }
                if !credits.is_empty() {
                    self.rail.post(&credits)?;
                    credits.clear();
                } else if before.lost {
                    return Ok(());
                } else {
                    self.bell.wait(before);
                }
            }
        }

        /// Sends for `time`. Bytes per second, all of them received.
        fn send(mut self, streams: usize, time: Duration) -> Result<f64, RailError> {
            let mut tails = vec![0; streams];
            let (mut chunks, mut completions) = (Vec::new(), Vec::new());
            let start = Instant::now();
            while start.elapsed() < time {
                let before = self.bell.now();
                for (stream, tail) in tails.iter_mut().enumerate() {
                    let head = self.index(ring(streams) + LINE * stream);
                    while *tail + CHUNK <= head + SLOTS {
                        *tail += CHUNK;
                        chunks.push(self.posting(streams, stream, *tail, CHUNK));
                    }
                }
                if chunks.is_empty() {
                    self.bell.wait(before);
                } else {
                    self.rail.post(&chunks)?;
                    chunks.clear();
                }
                self.rail.poll(&mut completions)?;
                completions.clear();
            }
            assert!(self.rail.drain(Instant::now() + LIMIT).is_empty(), "the peer has not received all");
            Ok(tails.iter().sum::<u64>() as f64 * SLOT as f64 / start.elapsed().as_secs_f64())
        }
    }

    fn serve(listener: &TcpListener, streams: usize) -> Result<(), Box<dyn Error + Send + Sync>> {
        let connections: io::Result<_> = (0..streams).map(|_| Ok(listener.accept()?.0)).collect();
        Ok(End::new(1, connections?)?.serve(streams)?)
    }

    /// The peer may not listen yet.
    fn connect(address: SocketAddr) -> io::Result<TcpStream> {
        let start = Instant::now();
        loop {
            match TcpStream::connect(address) {
                Err(_) if start.elapsed() < LIMIT => thread::sleep(Duration::from_millis(20)),
                connection => return connection,
            }
        }
    }

    fn send(address: SocketAddr, streams: usize, seconds: f64) -> Result<(), Box<dyn Error + Send + Sync>> {
        // One after the other: they are accepted in this order.
        let connections: io::Result<_> = (0..streams).map(|_| connect(address)).collect();
        let rate = End::new(0, connections?)?.send(streams, Duration::from_secs_f64(seconds))?;
        let chunk = SLOT as u64 * CHUNK;
        println!(
            "{}",
            serde_json::json!({ "gbit_s": 8e-9 * rate, "chunk_bytes": chunk, "ring_bytes": RING })
        );
        Ok(())
    }

    fn both(seconds: f64) -> Result<(), Box<dyn Error + Send + Sync>> {
        for streams in [1, 2, 4] {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let address = listener.local_addr()?;
            let server = thread::spawn(move || serve(&listener, streams));
            send(address, streams, seconds)?;
            server.join().expect("the receiver does not panic")?;
        }
        Ok(())
    }

    pub fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
        let options = Options::parse();
        match options.role {
            Some(Role::Serve { address, streams }) => serve(&TcpListener::bind(address)?, streams),
            Some(Role::Send { address, streams, seconds }) => send(address, streams, seconds),
            None => both(if options.test { 0.02 } else { 2.0 }),
        }
    }
}

#[cfg(target_os = "linux")]
fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    linux::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("The rail over TCP is for Linux.");
}
