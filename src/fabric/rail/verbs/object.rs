//! The library's objects: each is destroyed before what it was made of.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use super::error::VerbsError;
use crate::sys::verbs as sys;

/// Destroys an object; an error number where it can't.
type Destroy<T> = unsafe extern "C" fn(*mut T) -> c_int;

/// An object of the library's, made of `Of`.
#[derive(Debug)]
pub(super) struct Object<T, Of> {
    raw: NonNull<T>,
    destroy: Destroy<T>,
    // Dropped after the object is destroyed.
    _of: Of,
}

// SAFETY: the library locks where its objects are shared; the raw pointer is theirs alone.
unsafe impl<T, Of: Send> Send for Object<T, Of> {}
// SAFETY: as above.
unsafe impl<T, Of: Sync> Sync for Object<T, Of> {}

impl<T, Of> Object<T, Of> {
    /// The object that `call` has returned, or why it returned none.
    ///
    /// # Safety
    /// `raw` is null, or alive and nobody else's; `destroy` destroys it; it needs nothing but `of` to live.
    pub(super) unsafe fn made(
        raw: *mut T,
        destroy: Destroy<T>,
        of: Of,
        device: &str,
        call: &'static str,
    ) -> Result<Self, VerbsError> {
        match NonNull::new(raw) {
            Some(raw) => Ok(Self { raw, destroy, _of: of }),
            None => Err(VerbsError::call(device, call, &io::Error::last_os_error())),
        }
    }

    /// For calls of the library: alive as long as `self`.
    pub(super) fn raw(&self) -> *mut T {
        self.raw.as_ptr()
    }

    /// A field that the library does not change while the object lives.
    pub(super) fn get<R>(&self, read: impl FnOnce(&T) -> R) -> R {
        // SAFETY: alive as long as `self`.
        read(unsafe { self.raw.as_ref() })
    }
}

impl<T, Of> Drop for Object<T, Of> {
    fn drop(&mut self) {
        // SAFETY: alive until now, by the contract of `made`.
        let status = unsafe { (self.destroy)(self.raw()) };
        if status != 0 {
            let error = io::Error::from_raw_os_error(status);
            tracing::warn!(kind = std::any::type_name::<T>(), %error, "an object of libibverbs was not destroyed");
        }
    }
}

/// An opened device.
pub(super) type Context = Object<sys::Context, ()>;
/// What may be used together.
pub(super) type Domain = Object<sys::Pd, Arc<Context>>;
/// Where completion queues wake a thread.
pub(super) type Channel = Object<sys::CompChannel, Arc<Context>>;
/// A completion queue.
pub(super) type Completions = Object<sys::Cq, Arc<Channel>>;
/// A receive queue that all queue pairs share.
pub(super) type Receives = Object<sys::Srq, Arc<Domain>>;
