//! A device, opened: its port, its address and its limits.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int};
use std::io;
use std::mem::zeroed;
use std::sync::Arc;

use super::error::VerbsError;
use super::object::{Channel, Completions, Context, Domain, Object, Receives};
use super::sysfs::{Gid, RdmaSysfs};
use crate::config::Verbs;
use crate::sys::verbs::{self as sys, Library};

/// Which device a rank takes, where the configuration names none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Preference<'a> {
    /// Index of the rank on its node.
    pub(super) local_rank: usize,
    /// PCI address of the rank's GPU.
    pub(super) gpu: Option<&'a str>,
}

/// A device with an active port.
pub(super) struct Device {
    pub(super) library: &'static Library,
    pub(super) name: String,
    pub(super) context: Arc<Context>,
    pub(super) limits: sys::DeviceAttr,
    pub(super) port_number: u8,
    pub(super) port: sys::PortAttr,
    /// None where InfiniBand's local identifiers do.
    pub(super) gid: Option<Gid>,
}

impl Device {
    /// Opens the device that `config` names, or the one that suits the rank best.
    pub(super) fn open(config: &Verbs, preference: Preference<'_>) -> Result<Self, VerbsError> {
        let library = Library::get().map_err(VerbsError::NoLibrary)?;
        let (list, sysfs) = (List::new(library), RdmaSysfs::default());
        let (name, port_number) = choose(config, preference, &list.names(), &sysfs)?;
        let context = Arc::new(list.open(&name)?);
        // SAFETY: plain numbers, for which zeros do.
        let mut limits = unsafe { zeroed::<sys::DeviceAttr>() };
        // SAFETY: the device is open, and the attributes are ours.
        let status = unsafe { (library.query_device)(context.raw(), &mut limits) };
        check(&name, "ibv_query_device", status)?;
        let port = query_port(library, &context, port_number);
        let port = port.map_err(|error| VerbsError::call(&name, "ibv_query_port", &error))?;
        let gid = sysfs.gid(&name, port_number, config.gid);
        if gid.is_none() && (port.link_layer == sys::LINK_LAYER_ETHERNET as u8 || config.gid.is_some()) {
            return Err(VerbsError::NoGid { device: name, port: port_number, wanted: config.gid });
        }
        Ok(Self { library, name, context, limits, port_number, port, gid })
    }

    /// Whether packets need a global address because the network is Ethernet.
    pub(super) fn is_ethernet(&self) -> bool {
        self.port.link_layer == sys::LINK_LAYER_ETHERNET as u8
    }

    /// Whether its port carries data now.
    pub(super) fn has_link(&self) -> bool {
        let port = query_port(self.library, &self.context, self.port_number);
        port.is_ok_and(|port| [sys::PORT_ACTIVE, sys::PORT_ACTIVE_DEFER].contains(&port.state))
    }

    pub(super) fn domain(&self) -> Result<Arc<Domain>, VerbsError> {
        let (library, context) = (self.library, self.context.clone());
        // SAFETY: the device is open; the domain needs it alone.
        let domain = unsafe {
            let raw = (library.alloc_pd)(context.raw());
            Object::made(raw, library.dealloc_pd, context, &self.name, "ibv_alloc_pd")
        };
        domain.map(Arc::new)
    }

    pub(super) fn channel(&self) -> Result<Arc<Channel>, VerbsError> {
        let (library, context) = (self.library, self.context.clone());
        // SAFETY: as in `domain`.
        let channel = unsafe {
            let raw = (library.create_comp_channel)(context.raw());
            Object::made(raw, library.destroy_comp_channel, context, &self.name, "ibv_create_comp_channel")
        };
        channel.map(Arc::new)
    }

    /// A queue for `room` completions.
    pub(super) fn completions(
        &self,
        channel: &Arc<Channel>,
        room: usize,
    ) -> Result<Arc<Completions>, VerbsError> {
        let (library, room) = (self.library, room.max(1) as c_int);
        // SAFETY: device and channel are alive, and the queue keeps the channel.
        let queue = unsafe {
            let raw = (library.create_cq)(self.context.raw(), room, std::ptr::null_mut(), channel.raw(), 0);
            Object::made(raw, library.destroy_cq, channel.clone(), &self.name, "ibv_create_cq")
        };
        queue.map(Arc::new)
    }

    /// A queue for `room` receives without data.
    pub(super) fn receives(&self, domain: &Arc<Domain>, room: usize) -> Result<Arc<Receives>, VerbsError> {
        let attr = sys::SrqAttr { max_wr: room as u32, max_sge: 1, srq_limit: 0 };
        let mut attr = sys::SrqInitAttr { srq_context: std::ptr::null_mut(), attr };
        // SAFETY: the domain is alive, and the queue keeps it.
        let queue = unsafe {
            let raw = (self.library.create_srq)(domain.raw(), &mut attr);
            Object::made(raw, self.library.destroy_srq, domain.clone(), &self.name, "ibv_create_srq")
        };
        queue.map(Arc::new)
    }
}

fn query_port(library: &Library, context: &Context, port_number: u8) -> io::Result<sys::PortAttr> {
    // SAFETY: plain numbers, for which zeros do.
    let mut port = unsafe { zeroed::<sys::PortAttr>() };
    // SAFETY: the device is open, and the attributes are ours.
    ok(unsafe { (library.query_port)(context.raw(), port_number, &mut port) }).map(|()| port)
}

/// What an error number says.
fn ok(status: c_int) -> io::Result<()> {
    if status == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(status.abs())) }
}

/// What a call that returns an error number comes to.
pub(super) fn check(device: &str, call: &'static str, status: c_int) -> Result<(), VerbsError> {
    ok(status).map_err(|error| VerbsError::call(device, call, &error))
}

/// The device, and its port.
fn choose(
    config: &Verbs,
    preference: Preference<'_>,
    names: &[String],
    sysfs: &RdmaSysfs,
) -> Result<(String, u8), VerbsError> {
    let wanted = |name: &&String| config.device.as_ref().is_none_or(|wanted| wanted == *name);
    let candidates: Vec<&str> = names.iter().filter(wanted).map(String::as_str).collect();
    let Some(first) = candidates.first() else {
        return Err(VerbsError::NoDevice { wanted: config.device.clone(), found: names.to_vec() });
    };
    let ports = |device: &str| config.port.map_or_else(|| sysfs.ports(device), |port| vec![port]);
    let active = |device: &str| ports(device).into_iter().find(|&port| sysfs.is_active(device, port));
    let usable: Vec<&str> = candidates.iter().copied().filter(|device| active(device).is_some()).collect();
    let near = preference.gpu.map_or(usable.clone(), |gpu| sysfs.nearest(gpu, &usable));
    match near.get(preference.local_rank % near.len().max(1)) {
        Some(&device) => Ok((device.into(), active(device).expect("usable"))),
        None => {
            let port = ports(first).first().copied().unwrap_or(1);
            Err(VerbsError::PortDown { device: (*first).into(), port, state: sysfs.state(first, port) })
        }
    }
}

/// The devices that the library finds.
struct List {
    library: &'static Library,
    list: *mut *mut sys::Device,
    count: usize,
}

impl List {
    fn new(library: &'static Library) -> Self {
        let mut count = 0;
        // SAFETY: `count` is ours.
        let list = unsafe { (library.get_device_list)(&mut count) };
        let count = if list.is_null() { 0 } else { count as usize };
        Self { library, list, count }
    }

    fn devices(&self) -> impl Iterator<Item = (String, *mut sys::Device)> {
        (0..self.count).map(|i| {
            // SAFETY: the list has `count` devices until it is freed.
            let device = unsafe { *self.list.add(i) };
            // SAFETY: as above.
            (text(unsafe { (self.library.get_device_name)(device) }), device)
        })
    }

    /// Their names in an order of their own: that of the library may change from one process to the next.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.devices().map(|(name, _)| name).collect();
        // `mlx5_10` comes after `mlx5_9`.
        names.sort_by_key(|name| {
            let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
            (stem.to_string(), name[stem.len()..].parse::<u64>().unwrap_or(0))
        });
        names
    }

    fn open(&self, name: &str) -> Result<Context, VerbsError> {
        let device = self.devices().find(|(found, _)| found == name).expect("a name of `names`").1;
        // SAFETY: the list is alive; an open device doesn't need it.
        unsafe {
            let raw = (self.library.open_device)(device);
            Object::made(raw, self.library.close_device, (), name, "ibv_open_device")
        }
    }
}

impl Drop for List {
    fn drop(&mut self) {
        if !self.list.is_null() {
            // SAFETY: it is the library's, and freed once.
            unsafe { (self.library.free_device_list)(self.list) };
        }
    }
}

/// A string of the library's; empty where there is none.
pub(super) fn text(string: *const c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: the library's strings end and stay.
    unsafe { CStr::from_ptr(string) }.to_string_lossy().into_owned()
}
