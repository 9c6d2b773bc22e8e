//! libibverbs: what of it the rail over RDMA needs, as `infiniband/verbs.h` declares it.
//!
//! Names are C's without `ibv_`. The library's ABI is stable since its symbols are versioned `IBVERBS_1.1`; a test holds
//! sizes, offsets and constants against the header where that is installed.

#![allow(unsafe_code)]

mod types;

pub(crate) use types::*;

use std::error::Error as _;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Error;

/// What the loader looks for.
const NAME: &str = "libibverbs.so.1";

/// Declares [`Library`]: a pointer for each function, none for an optional one that an older library lacks.
macro_rules! library {
    (
        $(fn $name:ident($($argument:ty),*) $(-> $result:ty)?;)*
        $(optional fn $newer:ident($($newer_argument:ty),*) $(-> $newer_result:ty)?;)*
    ) => {
        /// The library's functions.
        pub(crate) struct Library {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            $(pub(crate) $newer: Option<unsafe extern "C" fn($($newer_argument),*) $(-> $newer_result)?>,)*
        }

        impl Library {
            fn load(name: &str) -> Result<Self, Error> {
                // SAFETY: its constructors only register its providers.
                let library = unsafe { libloading::Library::new(name)? };
                // SAFETY: the signatures are the header's.
                let loaded = unsafe {
                    Self {
                        $($name: *library.get(concat!("ibv_", stringify!($name)))?,)*
                        $($newer: library.get(concat!("ibv_", stringify!($newer))).ok().map(|symbol| *symbol),)*
                    }
                };
                // Its functions are called as long as the process lives.
                std::mem::forget(library);
                Ok(loaded)
            }
        }
    };
}

library! {
    fn get_device_list(*mut c_int) -> *mut *mut Device;
    fn free_device_list(*mut *mut Device);
    fn get_device_name(*mut Device) -> *const c_char;
    fn open_device(*mut Device) -> *mut Context;
    fn close_device(*mut Context) -> c_int;
    fn query_device(*mut Context, *mut DeviceAttr) -> c_int;
    fn query_port(*mut Context, u8, *mut PortAttr) -> c_int;
    fn get_async_event(*mut Context, *mut AsyncEvent) -> c_int;
    fn ack_async_event(*mut AsyncEvent);
    fn event_type_str(c_uint) -> *const c_char;
    fn wc_status_str(c_uint) -> *const c_char;
    fn alloc_pd(*mut Context) -> *mut Pd;
    fn dealloc_pd(*mut Pd) -> c_int;
    fn reg_mr(*mut Pd, *mut c_void, usize, c_int) -> *mut Mr;
    fn dereg_mr(*mut Mr) -> c_int;
    fn create_comp_channel(*mut Context) -> *mut CompChannel;
    fn destroy_comp_channel(*mut CompChannel) -> c_int;
    fn create_cq(*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq;
    fn destroy_cq(*mut Cq) -> c_int;
    fn get_cq_event(*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int;
    fn ack_cq_events(*mut Cq, c_uint);
    fn create_srq(*mut Pd, *mut SrqInitAttr) -> *mut Srq;
    fn destroy_srq(*mut Srq) -> c_int;
    fn create_qp(*mut Pd, *mut QpInitAttr) -> *mut Qp;
    fn modify_qp(*mut Qp, *mut QpAttr, c_int) -> c_int;
    fn destroy_qp(*mut Qp) -> c_int;
    optional fn reg_dmabuf_mr(*mut Pd, u64, usize, u64, c_int, c_int) -> *mut Mr;
}

impl Library {
    /// The library, loaded once.
    ///
    /// # Errors
    /// Why it can't be loaded.
    pub(crate) fn get() -> Result<&'static Self, String> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        LIBRARY.get_or_init(|| Self::load(NAME).map_err(|error| why(&error))).as_ref().map_err(Clone::clone)
    }
}

/// What the loader says; the error itself only names its call.
fn why(error: &Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

// What the header defines inline: a call through the operations of the device's driver.

/// Posts a chain of requests; the error number, with the first that was not posted.
///
/// # Safety
/// The queue pair is alive; so are the requests and their pieces until this returns, and what those name until the
/// requests have completed.
#[inline]
pub(crate) unsafe fn post_send(qp: *mut Qp, requests: *mut SendWr, bad: &mut *mut SendWr) -> c_int {
    // SAFETY: alive by contract; a queue pair has a context.
    unsafe { ((*(*qp).context).ops.post_send)(qp, requests, bad) }
}

/// Posts a chain of receives; the error number, with the first that was not posted.
///
/// # Safety
/// As [`post_send`], of a shared receive queue.
pub(crate) unsafe fn post_srq_recv(srq: *mut Srq, requests: *mut RecvWr, bad: &mut *mut RecvWr) -> c_int {
    // SAFETY: alive by contract; a queue has a context.
    unsafe { ((*(*srq).context).ops.post_srq_recv)(srq, requests, bad) }
}

/// Takes completions, as many as `into` has room for; negative where the queue has failed.
///
/// # Safety
/// The queue is alive.
#[inline]
pub(crate) unsafe fn poll_cq(cq: *mut Cq, into: &mut [Wc]) -> c_int {
    let most = c_int::try_from(into.len()).unwrap_or(c_int::MAX);
    // SAFETY: alive by contract; a queue has a context; there is room for as many.
    unsafe { ((*(*cq).context).ops.poll_cq)(cq, most, into.as_mut_ptr()) }
}

/// Asks for one event with the next completion; the error number.
///
/// # Safety
/// The queue is alive.
pub(crate) unsafe fn req_notify_cq(cq: *mut Cq) -> c_int {
    // SAFETY: alive by contract; a queue has a context.
    unsafe { ((*(*cq).context).ops.req_notify_cq)(cq, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_is_named() {
        let error = Library::load("libibverbs-of-nobody.so.1").map(|_| ()).unwrap_err();
        assert!(why(&error).contains("libibverbs-of-nobody.so.1"), "{error}");
    }
}
