//! Both ends of connections, in one process, and what a rail says of them.

#![allow(dead_code, reason = "every file takes what it needs")]

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use railhop::fabric::rail::{Listener, RailError};
use rustix::net::{AddressFamily, SocketType, bind, connect, listen, socket, sockopt};

/// Connections of two ranks: the i-th of one is the i-th of the other. Their buffers hold about `buffer` bytes, where
/// that is given.
pub fn connections(count: usize, buffer: Option<usize>) -> [Vec<TcpStream>; 2] {
    let sized = || {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        if let Some(bytes) = buffer {
            // Before there is a connection, for the window's scale is agreed on then.
            sockopt::set_socket_send_buffer_size(&socket, bytes).unwrap();
            sockopt::set_socket_recv_buffer_size(&socket, bytes).unwrap();
        }
        socket
    };
    let listener = sized();
    bind(&listener, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    listen(&listener, 1).unwrap();
    let listener = TcpListener::from(listener);
    let pair = |_| {
        let socket = sized();
        connect(&socket, &listener.local_addr().unwrap()).unwrap();
        (TcpStream::from(socket), listener.accept().unwrap().0)
    };
    let (ours, theirs) = (0..count).map(pair).unzip();
    [ours, theirs]
}

/// What a rail has told its rank.
#[derive(Default)]
pub struct Heard {
    signals: AtomicU64,
    lost: Mutex<Vec<(usize, Option<RailError>)>>,
}

impl Heard {
    pub fn signals(&self) -> u64 {
        self.signals.load(Ordering::Acquire)
    }

    pub fn lost(&self) -> Vec<(usize, Option<RailError>)> {
        self.lost.lock().unwrap().clone()
    }
}

impl Listener for Heard {
    fn signalled(&self) {
        self.signals.fetch_add(1, Ordering::Release);
    }

    fn lost(&self, peer: usize, failure: Option<RailError>) {
        self.lost.lock().unwrap().push((peer, failure));
    }
}
