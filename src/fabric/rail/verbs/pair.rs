//! A queue pair: a reliable connection to a peer.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::mem::zeroed;
use std::sync::Arc;

use super::card::End;
use super::device::{Device, check};
use super::error::VerbsError;
use super::object::{Completions, Domain, Object, Receives};
use crate::config::Verbs;
use crate::sys::verbs::{self as sys, Library};

/// Bytes that come with a request: a signal's.
const INLINE: u32 = size_of::<u64>() as u32;

/// Hops of a packet at most, where networks route.
const HOP_LIMIT: u8 = 64;

/// For ever: a peer that has no receive for a signal has been slow, and posts one soon.
const RNR_RETRY: u8 = 7;

/// When it is tried again, as the code for 0.16 ms.
const RNR_TIMER: u8 = 8;

/// What queue pairs of a rank have in common.
pub(super) struct Shared {
    pub(super) domain: Arc<Domain>,
    pub(super) sends: Arc<Completions>,
    pub(super) arrivals: Arc<Completions>,
    /// None where no signal wakes anybody.
    pub(super) receives: Option<Arc<Receives>>,
}

/// What a queue pair has room for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// Requests under way.
    pub(super) requests: usize,
    /// Pieces of one.
    pub(super) pieces: usize,
}

type Of = (Arc<Domain>, Arc<Completions>, Arc<Completions>, Option<Arc<Receives>>);

/// A queue pair that is ready to be connected, or connected.
pub(super) struct QueuePair {
    object: Object<sys::Qp, Of>,
    library: &'static Library,
}

impl QueuePair {
    /// A queue pair that peers may write through once it is connected.
    pub(super) fn new(device: &Device, shared: &Shared, room: Room) -> Result<Self, VerbsError> {
        let Shared { domain, sends, arrivals, receives } = shared;
        // SAFETY: null pointers and zeros say "nothing".
        let mut init = unsafe { zeroed::<sys::QpInitAttr>() };
        init.send_cq = sends.raw();
        init.recv_cq = arrivals.raw();
        init.srq = receives.as_ref().map_or(std::ptr::null_mut(), |receives| receives.raw());
        init.cap = sys::QpCap {
            max_send_wr: room.requests as u32,
            max_recv_wr: 1,
            max_send_sge: room.pieces as u32,
            max_recv_sge: 1,
            max_inline_data: INLINE,
        };
        init.qp_type = sys::QPT_RC;
        let of = (domain.clone(), sends.clone(), arrivals.clone(), receives.clone());
        let library = device.library;
        // SAFETY: domain and queues are alive, and it keeps them.
        let object = unsafe {
            let raw = (library.create_qp)(domain.raw(), &mut init);
            Object::made(raw, library.destroy_qp, of, &device.name, "ibv_create_qp")?
        };
        let pair = Self { object, library };
        let mut attr = attributes(sys::QPS_INIT);
        attr.port_num = device.port_number;
        attr.qp_access_flags = sys::ACCESS_REMOTE_WRITE;
        let mask = sys::QP_STATE | sys::QP_PKEY_INDEX | sys::QP_PORT | sys::QP_ACCESS_FLAGS;
        pair.modify(attr, mask, &device.name, "ibv_modify_qp to INIT")?;
        Ok(pair)
    }

    /// Its number, by which the other end and completions name it.
    pub(super) fn number(&self) -> u32 {
        self.object.get(|pair| pair.qp_num)
    }

    /// For calls of the library: alive as long as `self`.
    pub(super) fn raw(&self) -> *mut sys::Qp {
        self.object.raw()
    }

    /// Connects it with the queue pair `number` at the end `far`; `near` is its own.
    pub(super) fn connect(
        &self,
        device: &Device,
        config: &Verbs,
        (near, far): (&End, &End),
        number: u32,
    ) -> Result<(), VerbsError> {
        let mut attr = attributes(sys::QPS_RTR);
        attr.path_mtu = near.mtu.min(far.mtu).into();
        attr.dest_qp_num = number;
        attr.rq_psn = far.first_packet;
        attr.max_dest_rd_atomic = 1;
        attr.min_rnr_timer = RNR_TIMER;
        attr.ah_attr = route(device, config.class, near, far);
        let mask = sys::QP_STATE | sys::QP_AV | sys::QP_PATH_MTU | sys::QP_DEST_QPN | sys::QP_RQ_PSN;
        let mask = mask | sys::QP_MAX_DEST_RD_ATOMIC | sys::QP_MIN_RNR_TIMER;
        self.modify(attr, mask, &device.name, "ibv_modify_qp to RTR")?;
        let mut attr = attributes(sys::QPS_RTS);
        (attr.timeout, attr.retry_cnt, attr.rnr_retry) = (config.timeout, config.retries, RNR_RETRY);
        attr.sq_psn = near.first_packet;
        attr.max_rd_atomic = 1;
        let mask = sys::QP_STATE | sys::QP_TIMEOUT | sys::QP_RETRY_CNT | sys::QP_RNR_RETRY;
        let mask = mask | sys::QP_SQ_PSN | sys::QP_MAX_QP_RD_ATOMIC;
        self.modify(attr, mask, &device.name, "ibv_modify_qp to RTS")
    }

    /// Ends it: nothing more is sent, received or read.
    pub(super) fn end(&self) {
        // A queue pair that has failed by itself is there already.
        let _ = self.modify(attributes(sys::QPS_ERR), sys::QP_STATE, "", "ibv_modify_qp to ERR");
    }

    fn modify(
        &self,
        mut attr: sys::QpAttr,
        mask: u32,
        device: &str,
        call: &'static str,
    ) -> Result<(), VerbsError> {
        // SAFETY: the queue pair is alive, the attributes are ours.
        check(device, call, unsafe { (self.library.modify_qp)(self.raw(), &mut attr, mask as c_int) })
    }
}

/// Attributes of which only the state is set.
fn attributes(state: u32) -> sys::QpAttr {
    // SAFETY: plain numbers, for which zeros do.
    let attr = unsafe { zeroed::<sys::QpAttr>() };
    sys::QpAttr { qp_state: state, ..attr }
}

/// The way from `near` to `far`. On InfiniBand local identifiers do within a subnet, whose number is in a GID's first
/// half.
fn route(device: &Device, (level, class): (u8, u8), near: &End, far: &End) -> sys::AhAttr {
    // SAFETY: plain numbers, for which zeros do.
    let mut way = unsafe { zeroed::<sys::AhAttr>() };
    (way.dlid, way.sl, way.port_num) = (far.lid, level, device.port_number);
    if device.is_ethernet() || near.gid[..8] != far.gid[..8] {
        way.is_global = 1;
        way.grh.dgid = bytemuck::cast(far.gid);
        way.grh.sgid_index = device.gid.map_or(0, |gid| gid.index);
        way.grh.hop_limit = HOP_LIMIT;
        way.grh.traffic_class = class;
    }
    way
}
