//! The synchronisation primitives of what is model-checked: loom's under `--cfg loom`, else std's.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Condvar, Mutex, atomic::AtomicU64, atomic::AtomicUsize, atomic::Ordering, atomic::fence,
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Condvar, Mutex, atomic::AtomicU64, atomic::AtomicUsize, atomic::Ordering, atomic::fence,
};
