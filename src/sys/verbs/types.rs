//! C's structures and constants. Of those that only the library makes, what follows the last field in use is left out.

use std::ffi::{c_int, c_uint, c_void};

/// A structure without fields in use.
macro_rules! opaque {
    ($($name:ident),*) => {
        $(
            #[repr(C)]
            pub(crate) struct $name {
                _bytes: [u8; 0],
            }
        )*
    };
}

opaque!(Device, Pd);

/// An operation that the library has left in place for older programs, or that is not in use.
type Unused = *const c_void;

/// `struct ibv_context_ops`.
#[repr(C)]
pub(crate) struct ContextOps {
    _before_poll_cq: [Unused; 11],
    pub(crate) poll_cq: unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int,
    pub(crate) req_notify_cq: unsafe extern "C" fn(*mut Cq, c_int) -> c_int,
    _before_post_srq_recv: [Unused; 7],
    pub(crate) post_srq_recv: unsafe extern "C" fn(*mut Srq, *mut RecvWr, *mut *mut RecvWr) -> c_int,
    _before_post_send: [Unused; 4],
    pub(crate) post_send: unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int,
    _after_post_send: [Unused; 6],
}

/// `struct ibv_context`.
#[repr(C)]
pub(crate) struct Context {
    pub(crate) device: *mut Device,
    pub(crate) ops: ContextOps,
    pub(crate) cmd_fd: c_int,
    pub(crate) async_fd: c_int,
}

/// `struct ibv_device_attr`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceAttr {
    pub(crate) fw_ver: [u8; 64],
    pub(crate) node_guid: u64,
    pub(crate) sys_image_guid: u64,
    pub(crate) max_mr_size: u64,
    pub(crate) page_size_cap: u64,
    pub(crate) vendor_id: u32,
    pub(crate) vendor_part_id: u32,
    pub(crate) hw_ver: u32,
    pub(crate) max_qp: c_int,
    pub(crate) max_qp_wr: c_int,
    pub(crate) device_cap_flags: c_uint,
    pub(crate) max_sge: c_int,
    pub(crate) max_sge_rd: c_int,
    pub(crate) max_cq: c_int,
    pub(crate) max_cqe: c_int,
    _max_mr_to_max_map_per_fmr: [c_int; 19],
    pub(crate) max_srq: c_int,
    pub(crate) max_srq_wr: c_int,
    pub(crate) max_srq_sge: c_int,
    pub(crate) max_pkeys: u16,
    pub(crate) local_ca_ack_delay: u8,
    pub(crate) phys_port_cnt: u8,
}

/// `struct ibv_port_attr`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct PortAttr {
    pub(crate) state: c_uint,
    pub(crate) max_mtu: c_uint,
    pub(crate) active_mtu: c_uint,
    pub(crate) gid_tbl_len: c_int,
    pub(crate) port_cap_flags: u32,
    pub(crate) max_msg_sz: u32,
    pub(crate) bad_pkey_cntr: u32,
    pub(crate) qkey_viol_cntr: u32,
    pub(crate) pkey_tbl_len: u16,
    pub(crate) lid: u16,
    pub(crate) sm_lid: u16,
    _lmc_to_phys_state: [u8; 8],
    pub(crate) link_layer: u8,
    pub(crate) flags: u8,
    pub(crate) port_cap_flags2: u16,
}

/// `struct ibv_async_event`; which member of the union counts, the type says.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AsyncEvent {
    pub(crate) element: EventElement,
    pub(crate) event_type: c_uint,
}

/// The union of [`AsyncEvent`].
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union EventElement {
    pub(crate) qp: *mut Qp,
    pub(crate) port_num: c_int,
}

/// `struct ibv_mr`.
#[repr(C)]
pub(crate) struct Mr {
    pub(crate) context: *mut Context,
    pub(crate) pd: *mut Pd,
    pub(crate) addr: *mut c_void,
    pub(crate) length: usize,
    pub(crate) handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

/// `struct ibv_comp_channel`.
#[repr(C)]
pub(crate) struct CompChannel {
    pub(crate) context: *mut Context,
    pub(crate) fd: c_int,
    pub(crate) refcnt: c_int,
}

/// `struct ibv_cq`.
#[repr(C)]
pub(crate) struct Cq {
    pub(crate) context: *mut Context,
}

/// `struct ibv_srq`.
#[repr(C)]
pub(crate) struct Srq {
    pub(crate) context: *mut Context,
}

/// `struct ibv_qp`.
#[repr(C)]
pub(crate) struct Qp {
    pub(crate) context: *mut Context,
    pub(crate) qp_context: *mut c_void,
    pub(crate) pd: *mut Pd,
    pub(crate) send_cq: *mut Cq,
    pub(crate) recv_cq: *mut Cq,
    pub(crate) srq: *mut Srq,
    pub(crate) handle: u32,
    pub(crate) qp_num: u32,
}

/// `struct ibv_srq_init_attr`.
#[repr(C)]
pub(crate) struct SrqInitAttr {
    pub(crate) srq_context: *mut c_void,
    pub(crate) attr: SrqAttr,
}

/// `struct ibv_srq_attr`.
#[repr(C)]
pub(crate) struct SrqAttr {
    pub(crate) max_wr: u32,
    pub(crate) max_sge: u32,
    pub(crate) srq_limit: u32,
}

/// `struct ibv_qp_cap`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct QpCap {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`.
#[repr(C)]
pub(crate) struct QpInitAttr {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut Cq,
    pub(crate) recv_cq: *mut Cq,
    pub(crate) srq: *mut Srq,
    pub(crate) cap: QpCap,
    pub(crate) qp_type: c_uint,
    pub(crate) sq_sig_all: c_int,
}

/// `struct ibv_global_route`; the GID in the order of its bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct GlobalRoute {
    /// C's union has 64-bit members.
    pub(crate) dgid: [u64; 2],
    pub(crate) flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
}

/// `struct ibv_ah_attr`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AhAttr {
    pub(crate) grh: GlobalRoute,
    pub(crate) dlid: u16,
    pub(crate) sl: u8,
    pub(crate) src_path_bits: u8,
    pub(crate) static_rate: u8,
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

/// `struct ibv_qp_attr`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct QpAttr {
    pub(crate) qp_state: c_uint,
    pub(crate) cur_qp_state: c_uint,
    pub(crate) path_mtu: c_uint,
    pub(crate) path_mig_state: c_uint,
    pub(crate) qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: c_uint,
    pub(crate) cap: QpCap,
    pub(crate) ah_attr: AhAttr,
    pub(crate) alt_ah_attr: AhAttr,
    pub(crate) pkey_index: u16,
    pub(crate) alt_pkey_index: u16,
    pub(crate) en_sqd_async_notify: u8,
    pub(crate) sq_draining: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) alt_port_num: u8,
    pub(crate) alt_timeout: u8,
    pub(crate) rate_limit: u32,
}

/// `struct ibv_sge`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sge {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// `struct ibv_send_wr`, of its unions the members of an RDMA WRITE.
#[repr(C)]
pub(crate) struct SendWr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut SendWr,
    pub(crate) sg_list: *mut Sge,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: c_uint,
    pub(crate) send_flags: c_uint,
    /// In the order of the network.
    pub(crate) imm_data: u32,
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    /// The rest of the largest members.
    pub(crate) _unions: [u64; 9],
}

/// `struct ibv_recv_wr`.
#[repr(C)]
pub(crate) struct RecvWr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut RecvWr,
    pub(crate) sg_list: *mut Sge,
    pub(crate) num_sge: c_int,
}

/// `struct ibv_wc`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wc {
    pub(crate) wr_id: u64,
    pub(crate) status: c_uint,
    pub(crate) opcode: c_uint,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    pub(crate) imm_data: u32,
    pub(crate) qp_num: u32,
    pub(crate) src_qp: u32,
    pub(crate) wc_flags: c_uint,
    pub(crate) pkey_index: u16,
    pub(crate) slid: u16,
    pub(crate) sl: u8,
    pub(crate) dlid_path_bits: u8,
}

/// Declares C's constants, and lists them with their names.
macro_rules! constants {
    ($($name:ident = $value:expr;)*) => {
        $(pub(crate) const $name: c_uint = $value;)*

        const CONSTANTS: &[(&str, c_uint)] = &[$((concat!("IBV_", stringify!($name)), $name)),*];
    };
}

constants! {
    PORT_ACTIVE = 4;
    PORT_ACTIVE_DEFER = 5;
    LINK_LAYER_ETHERNET = 2;
    QPT_RC = 2;
    QPS_INIT = 1;
    QPS_RTR = 2;
    QPS_RTS = 3;
    QPS_ERR = 6;
    QP_STATE = 1;
    QP_ACCESS_FLAGS = 1 << 3;
    QP_PKEY_INDEX = 1 << 4;
    QP_PORT = 1 << 5;
    QP_AV = 1 << 7;
    QP_PATH_MTU = 1 << 8;
    QP_TIMEOUT = 1 << 9;
    QP_RETRY_CNT = 1 << 10;
    QP_RNR_RETRY = 1 << 11;
    QP_RQ_PSN = 1 << 12;
    QP_MAX_QP_RD_ATOMIC = 1 << 13;
    QP_MIN_RNR_TIMER = 1 << 15;
    QP_SQ_PSN = 1 << 16;
    QP_MAX_DEST_RD_ATOMIC = 1 << 17;
    QP_DEST_QPN = 1 << 20;
    ACCESS_LOCAL_WRITE = 1;
    ACCESS_REMOTE_WRITE = 1 << 1;
    WR_RDMA_WRITE = 0;
    WR_RDMA_WRITE_WITH_IMM = 1;
    SEND_SIGNALED = 1 << 1;
    SEND_INLINE = 1 << 3;
    WC_SUCCESS = 0;
    WC_LOC_LEN_ERR = 1;
    WC_LOC_QP_OP_ERR = 2;
    WC_LOC_PROT_ERR = 4;
    WC_WR_FLUSH_ERR = 5;
    WC_BAD_RESP_ERR = 7;
    WC_LOC_ACCESS_ERR = 8;
    WC_REM_INV_REQ_ERR = 9;
    WC_REM_ACCESS_ERR = 10;
    WC_REM_OP_ERR = 11;
    WC_RETRY_EXC_ERR = 12;
    WC_RNR_RETRY_EXC_ERR = 13;
    WC_REM_ABORT_ERR = 16;
    WC_FATAL_ERR = 19;
    WC_RESP_TIMEOUT_ERR = 20;
    WC_GENERAL_ERR = 21;
    EVENT_CQ_ERR = 0;
    EVENT_QP_FATAL = 1;
    EVENT_QP_REQ_ERR = 2;
    EVENT_QP_ACCESS_ERR = 3;
    EVENT_DEVICE_FATAL = 8;
    EVENT_PORT_ERR = 10;
    EVENT_SRQ_ERR = 14;
}

/// Whether a request with this status has failed at the end that posted it, whatever the other did.
pub(crate) fn is_local(status: c_uint) -> bool {
    matches!(status, WC_LOC_LEN_ERR | WC_LOC_QP_OP_ERR | WC_LOC_PROT_ERR | WC_LOC_ACCESS_ERR | WC_FATAL_ERR)
}

/// C's name of a constant whose name begins with `prefix`; its number where the name is not known here.
pub(crate) fn name_of(prefix: &str, value: c_uint) -> String {
    let mut names = CONSTANTS.iter().filter(|(name, other)| name.starts_with(prefix) && *other == value);
    names.next().map_or_else(|| format!("{prefix}{value}"), |(name, _)| name.to_string())
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;
    use std::process::Command;

    use super::*;

    /// What C must come to: an expression, and Rust's value of it.
    macro_rules! layout {
        ($facts:ident; $($c:literal = $name:ident $([$size:ident])? { $($field:ident),* })*) => {
            $(
                $($facts.push((concat!("sizeof(struct ", $c, ")").to_string(), whole_size!($size $name)));)?
                $($facts.push((
                    concat!("offsetof(struct ", $c, ", ", stringify!($field), ")").to_string(),
                    offset_of!($name, $field),
                ));)*
            )*
        };
    }

    /// Whole structures have C's size.
    macro_rules! whole_size {
        (whole $name:ident) => {
            size_of::<$name>()
        };
    }

    fn facts() -> Vec<(String, usize)> {
        let mut facts: Vec<(String, usize)> =
            CONSTANTS.iter().map(|(name, value)| (name.to_string(), *value as usize)).collect();
        layout! { facts;
            "ibv_context_ops" = ContextOps [whole] { poll_cq, req_notify_cq, post_srq_recv, post_send }
            "ibv_context" = Context { device, ops, cmd_fd, async_fd }
            "ibv_device_attr" = DeviceAttr [whole] {
                max_mr_size, max_qp, max_qp_wr, max_sge, max_cqe, max_srq, max_srq_wr, max_pkeys, phys_port_cnt
            }
            "ibv_port_attr" = PortAttr [whole] {
                state, active_mtu, gid_tbl_len, max_msg_sz, lid, sm_lid, link_layer, flags, port_cap_flags2
            }
            "ibv_async_event" = AsyncEvent [whole] { element, event_type }
            "ibv_mr" = Mr [whole] { addr, length, lkey, rkey }
            "ibv_comp_channel" = CompChannel [whole] { context, fd }
            "ibv_cq" = Cq { context }
            "ibv_srq" = Srq { context }
            "ibv_qp" = Qp { context, srq, qp_num }
            "ibv_srq_init_attr" = SrqInitAttr [whole] { srq_context, attr }
            "ibv_srq_attr" = SrqAttr [whole] { max_wr, max_sge, srq_limit }
            "ibv_qp_cap" = QpCap [whole] {
                max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data
            }
            "ibv_qp_init_attr" = QpInitAttr [whole] { send_cq, recv_cq, srq, cap, qp_type, sq_sig_all }
            "ibv_global_route" = GlobalRoute [whole] { dgid, flow_label, sgid_index, hop_limit, traffic_class }
            "ibv_ah_attr" = AhAttr [whole] { grh, dlid, sl, static_rate, is_global, port_num }
            "ibv_qp_attr" = QpAttr [whole] {
                qp_state, path_mtu, rq_psn, sq_psn, dest_qp_num, qp_access_flags, cap, ah_attr, alt_ah_attr,
                pkey_index, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt,
                rnr_retry, rate_limit
            }
            "ibv_sge" = Sge [whole] { addr, length, lkey }
            "ibv_send_wr" = SendWr [whole] { wr_id, next, sg_list, num_sge, opcode, send_flags, imm_data }
            "ibv_recv_wr" = RecvWr [whole] { wr_id, next, sg_list, num_sge }
            "ibv_wc" = Wc [whole] {
                wr_id, status, opcode, vendor_err, byte_len, imm_data, qp_num, src_qp, wc_flags, dlid_path_bits
            }
        }
        facts.push((
            "offsetof(struct ibv_send_wr, wr.rdma.remote_addr)".into(),
            offset_of!(SendWr, remote_addr),
        ));
        facts.push(("offsetof(struct ibv_send_wr, wr.rdma.rkey)".into(), offset_of!(SendWr, rkey)));
        facts
    }

    /// `Some` with what the compiler says against these facts.
    fn refuted(facts: &[(String, usize)]) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("layout.c");
        let asserts = facts
            .iter()
            .map(|(c, value)| format!("_Static_assert({c} == {value}, \"{c} is not {value}\");\n"));
        let includes = "#include <stddef.h>\n#include <infiniband/verbs.h>\n";
        std::fs::write(&path, includes.to_string() + &asserts.collect::<String>()).unwrap();
        let output = Command::new("cc").arg("-fsyntax-only").arg(path).output().expect("a C compiler");
        (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    #[test]
    #[ignore = "needs a C compiler and infiniband/verbs.h"]
    fn structures_and_constants_are_those_of_the_header() {
        let mut facts = facts();
        assert_eq!(refuted(&facts), None);
        facts.push(("sizeof(struct ibv_wc)".into(), 47));
        assert!(refuted(&facts).is_some_and(|why| why.contains("sizeof(struct ibv_wc) is not 47")));
    }
}
