//! The rail's thread: it sleeps until the device or the rank has something for it, takes what has come, and goes on with
//! what waits for room.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_uint};
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::arrivals::{Arrivals, Arrived};
use super::device::text;
use super::object::{Channel, Context};
use super::traffic::Traffic;
use crate::fabric::rail::Listener;
use crate::sys::verbs::{self as sys, Library};

/// What the rank's threads and the rail's share.
pub(super) struct Shared {
    traffic: Mutex<Traffic>,
    /// Something has moved: for whoever drains.
    pub(super) progress: Condvar,
    bell: OwnedFd,
    stop: AtomicBool,
}

impl Shared {
    pub(super) fn new(traffic: Traffic) -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            traffic: Mutex::new(traffic),
            progress: Condvar::new(),
            bell,
            stop: AtomicBool::new(false),
        })
    }

    pub(super) fn traffic(&self) -> MutexGuard<'_, Traffic> {
        self.traffic.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Wakes the rail's thread.
    pub(super) fn ring(&self) {
        // It can't fail but for a counter that is full, and then the thread is awake.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Ends the rail's thread.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.ring();
    }
}

/// The thread's own.
pub(super) struct Worker {
    shared: Arc<Shared>,
    library: &'static Library,
    context: Arc<Context>,
    channel: Arc<Channel>,
    arrivals: Arrivals,
    arrivals_armed: bool,
    listener: Arc<dyn Listener>,
    wakes: bool,
    port: u8,
}

impl Worker {
    /// The worker of a rail whose traffic is `shared`.
    ///
    /// # Errors
    /// Descriptors of the device can't be made non-blocking.
    pub(super) fn new(
        shared: &Arc<Shared>,
        channel: Arc<Channel>,
        arrivals: Arrivals,
        listener: Arc<dyn Listener>,
    ) -> io::Result<Self> {
        let traffic = shared.traffic();
        let device = &traffic.device;
        let worker = Self {
            shared: shared.clone(),
            library: device.library,
            context: device.context.clone(),
            channel,
            wakes: arrivals.receives.is_some(),
            arrivals,
            arrivals_armed: false,
            listener,
            port: device.port_number,
        };
        rustix::io::ioctl_fionbio(worker.channel_fd(), true)?;
        rustix::io::ioctl_fionbio(worker.events_fd(), true)?;
        Ok(worker)
    }

    /// Works until it is stopped.
    pub(super) fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            let signals = self.receive();
            self.send(signals);
            let [queues, device] = self.sleep();
            if device {
                self.device_events();
            }
            if queues {
                self.queue_event();
            }
        }
    }

    /// Takes signals and asks for an event with the next; whether any came.
    fn receive(&mut self) -> bool {
        if !self.wakes {
            return false;
        }
        let arrived = self.arrivals.take().and_then(|first| {
            if std::mem::replace(&mut self.arrivals_armed, true) {
                return Ok(first);
            }
            self.arrivals.arm()?;
            // What came before the request causes no event.
            let Arrived { signals, failures } = self.arrivals.take()?;
            Ok(Arrived { signals: first.signals + signals, failures: [first.failures, failures].concat() })
        });
        match arrived {
            Ok(arrived) => {
                self.lose_receivers(&arrived.failures);
                arrived.signals > 0
            }
            Err(error) => {
                self.shared.traffic().lose_all(&error.to_string());
                false
            }
        }
    }

    fn lose_receivers(&self, failures: &[(u32, u32)]) {
        if failures.is_empty() {
            return;
        }
        let mut traffic = self.shared.traffic();
        for &(number, status) in failures {
            if let Some(lane) = traffic.lane_of(number) {
                traffic.fail(lane, "receive, beside RDMA WRITE", status);
            }
        }
    }

    /// Goes on with what is under way, and tells the listener what is new; `signals`: that signals have come.
    fn send(&self, signals: bool) {
        let (completed, losses) = {
            let mut traffic = self.shared.traffic();
            traffic.advance();
            traffic.arm();
            (traffic.has_ready(), traffic.take_losses())
        };
        self.shared.progress.notify_all();
        if signals || (self.wakes && completed) {
            self.listener.signalled();
        }
        for (rank, error) in losses {
            tracing::warn!(peer = rank, %error, "a rail peer is lost");
            self.listener.lost(rank, Some(error));
        }
    }

    fn channel_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the channel.
        unsafe { BorrowedFd::borrow_raw(self.channel.get(|channel| channel.fd)) }
    }

    fn events_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the device.
        unsafe { BorrowedFd::borrow_raw(self.context.get(|context| context.async_fd)) }
    }

    /// Sleeps until there is something; whether queues or the device have events.
    fn sleep(&self) -> [bool; 2] {
        let fds = [self.channel_fd(), self.events_fd(), self.shared.bell.as_fd()];
        let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        // A signal may end it early, and does no harm.
        let _ = poll(&mut fds, None);
        let [queues, device, bell] = fds.map(|fd| !fd.revents().is_empty());
        if bell {
            let _ = rustix::io::read(&self.shared.bell, &mut [0; 8]);
        }
        [queues, device]
    }

    /// Takes the event of a completion queue; that of the other, if there is one, ends the next sleep at once.
    fn queue_event(&mut self) {
        let (mut queue, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel is alive, the places are ours.
        if unsafe { (self.library.get_cq_event)(self.channel.raw(), &mut queue, &mut context) } != 0 {
            return;
        }
        // SAFETY: the library named it, and it was not acknowledged yet.
        unsafe { (self.library.ack_cq_events)(queue, 1) };
        if queue == self.arrivals.completions.raw() {
            self.arrivals_armed = false;
        } else {
            self.shared.traffic().armed = false;
        }
    }

    /// Takes what the device says of itself. Queue pairs that it names are alive: lanes end after this thread.
    fn device_events(&self) {
        // SAFETY: zeros are an event of a queue without address.
        let mut event = unsafe { zeroed::<sys::AsyncEvent>() };
        // SAFETY: the device is open, the place is ours.
        while unsafe { (self.library.get_async_event)(self.context.raw(), &mut event) } == 0 {
            let kind = event.event_type;
            // SAFETY: every member is valid for the bytes of any other.
            let (pair, port) = unsafe { (event.element.qp, event.element.port_num) };
            // SAFETY: just got, and acknowledged once.
            unsafe { (self.library.ack_async_event)(&mut event) };
            self.device_event(kind, pair, port);
        }
    }

    fn device_event(&self, kind: c_uint, pair: *mut sys::Qp, port: c_int) {
        // SAFETY: it takes any number.
        let meaning = text(unsafe { (self.library.event_type_str)(kind) });
        let reason = format!("{} ({meaning})", sys::name_of("IBV_EVENT_", kind));
        let mut traffic = self.shared.traffic();
        match kind {
            sys::EVENT_QP_FATAL | sys::EVENT_QP_REQ_ERR | sys::EVENT_QP_ACCESS_ERR => {
                if let Some(lane) = traffic.lane_at(pair) {
                    traffic.lose_lane(lane, &reason, false);
                }
            }
            sys::EVENT_PORT_ERR if port == c_int::from(self.port) => traffic.lose_all(&reason),
            sys::EVENT_CQ_ERR | sys::EVENT_SRQ_ERR | sys::EVENT_DEVICE_FATAL => traffic.lose_all(&reason),
            _ => tracing::debug!(event = kind, meaning, "an RDMA device says"),
        }
    }
}
