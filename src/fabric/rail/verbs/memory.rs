//! Memory that a device reads and writes by itself.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::device::Device;
use super::error::VerbsError;
use super::object::{Domain, Object};
use crate::fabric::mapped::Mapped;
use crate::sys::verbs as sys;

/// Memory for a NIC to reach.
#[derive(Debug)]
pub enum NicMemory {
    /// The host's.
    Host(Mapped),
    /// A GPU's, by what the kernel shares between drivers (dmabuf).
    Device {
        /// What the GPU's driver has exported.
        descriptor: OwnedFd,
        /// Where the memory begins in it.
        offset: u64,
        /// Its address on the GPU, by which peers name it.
        address: u64,
        /// Its size.
        bytes: usize,
    },
}

impl NicMemory {
    fn address(&self) -> u64 {
        match self {
            Self::Host(memory) => memory.base().as_ptr() as u64,
            Self::Device { address, .. } => *address,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Host(memory) => memory.bytes(),
            Self::Device { bytes, .. } => *bytes,
        }
    }
}

/// What a memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// The own postings' data is in it.
    Source,
    /// Peers write it.
    Region,
}

impl Use {
    fn name(self) -> &'static str {
        match self {
            Self::Source => "memory of the send rings",
            Self::Region => "region",
        }
    }

    /// `IBV_ACCESS_RELAXED_ORDERING` is never asked for: it would let a signal pass the data before it on the way to
    /// memory.
    fn access(self) -> i32 {
        match self {
            Self::Source => 0,
            Self::Region => (sys::ACCESS_LOCAL_WRITE | sys::ACCESS_REMOTE_WRITE) as i32,
        }
    }
}

/// Memory that the device knows.
pub(super) struct Registered {
    object: Object<sys::Mr, Arc<Domain>>,
    memory: NicMemory,
}

impl Registered {
    pub(super) fn new(
        device: &Device,
        domain: &Arc<Domain>,
        memory: NicMemory,
        purpose: Use,
    ) -> Result<Self, VerbsError> {
        let (library, access, bytes) = (device.library, purpose.access(), memory.bytes());
        let refused = |reason| VerbsError::Memory {
            device: device.name.clone(),
            memory: purpose.name(),
            bytes,
            reason,
        };
        let (raw, call) = match &memory {
            NicMemory::Host(host) => {
                // SAFETY: mapped as long as a copy of `host` is used, as one is in `memory`.
                let raw =
                    unsafe { (library.reg_mr)(domain.raw(), host.base().as_ptr().cast(), bytes, access) };
                (raw, "ibv_reg_mr")
            }
            NicMemory::Device { descriptor, offset, address, .. } => {
                let register = library.reg_dmabuf_mr;
                let register = register
                    .ok_or_else(|| refused("libibverbs has no ibv_reg_dmabuf_mr: a newer one has".into()))?;
                // SAFETY: the descriptor is open; the kernel keeps what it stands for.
                let raw = unsafe {
                    register(domain.raw(), *offset, bytes, *address, descriptor.as_raw_fd(), access)
                };
                (raw, "ibv_reg_dmabuf_mr")
            }
        };
        let error = io::Error::last_os_error();
        // SAFETY: just made in this domain.
        let object = unsafe { Object::made(raw, library.dereg_mr, domain.clone(), &device.name, call) };
        object.map(|object| Self { object, memory }).map_err(|_| refused(explained(call, &error)))
    }

    pub(super) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    pub(super) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// The key for the own postings.
    pub(super) fn local_key(&self) -> u32 {
        self.object.get(|memory| memory.lkey)
    }

    /// The key for peers.
    pub(super) fn remote_key(&self) -> u32 {
        self.object.get(|memory| memory.rkey)
    }
}

/// What the system says, and what helps.
fn explained(call: &str, error: &io::Error) -> String {
    match error.kind() {
        // A limit on locked memory is reported as a lack of memory.
        io::ErrorKind::OutOfMemory => {
            format!("{call}: {error}: all of it must fit memory and the limit on locked memory (`ulimit -l`)")
        }
        _ => format!("{call}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_for_locked_memory_says_what_helps() {
        let error = io::Error::from(rustix::io::Errno::NOMEM);
        assert!(explained("ibv_reg_mr", &error).contains("ulimit -l"));
    }

    #[test]
    fn what_peers_write_is_never_reordered() {
        const RELAXED_ORDERING: i32 = 1 << 20;
        assert!([Use::Source, Use::Region].iter().all(|purpose| purpose.access() & RELAXED_ORDERING == 0));
    }
}
