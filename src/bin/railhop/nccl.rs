//! The baseline on devices: the packed all-to-all of `benches/peer`, by NCCL's grouped send and receive.
//!
//! A thread per rank, each with a GPU. Everything lies on the devices, as on railhop's. In the times:
//! - plan: destinations and counts of all tokens (a kernel), the exchange of counts, their way to the host, which needs
//!   them to send;
//! - dispatch: the copy of each token to its place in the order of sending, once per destination rank (a kernel), the
//!   exchange of rows, and of experts and weights beside them, straight into their final place;
//! - combine: the way back of all rows, and the f32 sum per token in rank order, rounded to BF16 (a kernel).
//!
//! Not in them: allocation (sizes are known beforehand), compilation, the set-up of communicators. Experts are the
//! identity. After the last iteration every row and sum is compared with what it must be.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::error::Error;
use std::ffi::CString;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg,
};
use cudarc::nccl::result::{NcclError, group_end, group_start};
use cudarc::nccl::{Comm, Id, NcclType, sys as library};
use cudarc::nvrtc::result::{NvrtcError, compile_program, create_program, destroy_program};
use cudarc::nvrtc::{Ptx, sys as compiler};
use half::bf16;

use crate::meeting::{self, Meeting};

const KERNELS: &str = include_str!("nccl.cu");

/// Threads of a block that finds tokens, and of one that copies or sums.
const COUNT_THREADS: u32 = 1024;
const ROW_THREADS: u32 = 256;

/// All functions of NCCL used; cudarc panics where one is missing.
const SYMBOLS: [&str; 7] = [
    "ncclCommAbort",
    "ncclCommInitRank",
    "ncclGetUniqueId",
    "ncclGroupEnd",
    "ncclGroupStart",
    "ncclRecv",
    "ncclSend",
];

/// What is to be moved.
pub struct Job<'a> {
    /// By rank, its device; none named: the first ones.
    pub devices: Vec<usize>,
    /// By expert, its rank.
    pub owner: Vec<u32>,
    /// Ranks.
    pub ranks: usize,
    /// Elements of a row.
    pub hidden: usize,
    /// Entries of a token.
    pub topk: usize,
    /// By rank, the experts of its tokens.
    pub topk_idx: &'a [Vec<i64>],
    /// By rank, their weights.
    pub topk_weights: &'a [Vec<f32>],
    /// The tokens, the same on every rank.
    pub x: Vec<bf16>,
    /// Iterations, all of them timed.
    pub iters: usize,
    /// The longest wait.
    pub deadline: Duration,
}

/// By rank and iteration: plan, dispatch, combine, and one after the other.
pub type Times = Vec<Vec<[Duration; 4]>>;

impl Job<'_> {
    /// Checks what it needs, then runs it.
    pub fn measure(&self) -> Result<Times, Box<dyn Error + Send + Sync>> {
        let devices = self.find_devices().map_err(|missing| format!("--baseline nccl: {missing}"))?;
        let id = Id::new().map_err(nccl("ncclGetUniqueId"))?;
        let run = |rank: usize, meeting: &mut Meeting| -> Result<Vec<_>, String> {
            let device = meeting.join(Device::new(self, rank, devices[rank]))?;
            let mut this = meeting.join(Rank::join(device, id))?;
            let times = (0..self.iters).map(|_| this.iteration(meeting)).collect::<Result<_, _>>()?;
            meeting.join(this.verify())?;
            Ok(times)
        };
        Ok(meeting::on_threads((0..self.ranks).collect(), self.deadline, run)?)
    }

    /// By rank, its device, if all that is needed is here.
    fn find_devices(&self) -> Result<Vec<usize>, String> {
        require_libraries()?;
        let found = railhop::device::cuda::devices().map_err(|error| error.to_string())?.len();
        let named: BTreeSet<_> = self.devices.iter().copied().collect();
        if let Some(absent) = named.iter().find(|&&device| device >= found) {
            return Err(format!("there is no CUDA device {absent}: {found} found"));
        }
        let devices = if self.devices.is_empty() { (0..found).collect() } else { self.devices.clone() };
        let there = if self.devices.is_empty() { found } else { named.len() };
        match there >= self.ranks && devices.len() == there {
            true => Ok(devices),
            false => {
                let whence = if self.devices.is_empty() { "found" } else { "different ones named" };
                Err(format!("NCCL needs a GPU for each rank: {} needed, {there} {whence}", self.ranks))
            }
        }
    }

    fn tokens(&self) -> usize {
        self.x.len() / self.hidden
    }

    fn row_bytes(&self) -> usize {
        size_of::<bf16>() * self.hidden
    }

    /// The ranks that `token` of `home` goes to, ascending.
    fn targets(&self, home: usize, token: usize) -> BTreeSet<usize> {
        let experts = &self.topk_idx[home][token * self.topk..][..self.topk];
        experts.iter().map(|&expert| self.owner[expert as usize] as usize).collect()
    }

    /// Rows from `home` to `target`.
    fn rows(&self, home: usize, target: usize) -> usize {
        (0..self.tokens()).filter(|&token| self.targets(home, token).contains(&target)).count()
    }
}

/// What is to be opened at run time is here.
fn require_libraries() -> Result<(), String> {
    // SAFETY: opening the library runs its initialisers, which depend on nothing of this process.
    if !unsafe { library::is_culib_present() } {
        let hint = "NCCL is not found: libnccl.so must be on the library path; where there is only libnccl.so.2, link \
                    libnccl.so to it in a folder and put that into LD_LIBRARY_PATH";
        return Err(hint.into());
    }
    // SAFETY: `culib` panics only where there is no library.
    let nccl = unsafe { library::culib() };
    // SAFETY: looked at, never called by this type.
    let has = |symbol: &str| unsafe { nccl.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_ok();
    if let Some(missing) = SYMBOLS.iter().find(|symbol| !has(symbol)) {
        return Err(format!("libnccl.so lacks {missing}: NCCL 2.7 or later is needed"));
    }
    // SAFETY: as above.
    match unsafe { compiler::is_culib_present() } {
        true => Ok(()),
        false => {
            Err("NVRTC is not found, which compiles its kernels: libnvrtc.so must be on the library path"
                .into())
        }
    }
}

/// A failed call, in words.
fn nccl(call: &'static str) -> impl Fn(NcclError) -> String {
    move |NcclError(result)| format!("{call} failed: {result:?}")
}

/// As [`nccl`], for the driver.
fn driver(what: &'static str) -> impl Fn(DriverError) -> String {
    move |error| format!("{what}: {error:?}")
}

/// The kernels, for compute capability `major.minor`.
fn compile((major, minor): (i32, i32)) -> Result<Vec<u8>, String> {
    fn failed(error: impl Debug) -> String {
        format!("the kernels of the baseline do not compile: {error:?}")
    }
    let source = CString::new(KERNELS).map_err(failed)?;
    let program = create_program(&source, None).map_err(failed)?;
    let options = [format!("--gpu-architecture=sm_{major}{minor}")];
    let mut cubin = Vec::new();
    // SAFETY: the program is alive up to its destruction, once, at the end; the cubin has the room that is asked for.
    unsafe {
        let compiled = compile_program(program, &options).and_then(|()| {
            let mut bytes = 0;
            compiler::nvrtcGetCUBINSize(program, &mut bytes).result()?;
            cubin.resize(bytes, 0u8);
            compiler::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()).result()
        });
        destroy_program(program).and(compiled).map_err(|NvrtcError(error)| failed(error))?;
    }
    Ok(cubin)
}

/// A GPU with everything of a rank but its communicator.
struct Device<'a> {
    job: &'a Job<'a>,
    rank: usize,
    stream: Arc<CudaStream>,
    /// All that has been enqueued.
    done: CudaEvent,
    kernels: Kernels,
    given: Given,
    plan: Plan,
    rows: Rows,
}

struct Kernels {
    count: CudaFunction,
    pack: CudaFunction,
    sum: CudaFunction,
}

/// What the rank brings.
struct Given {
    topk_idx: CudaSlice<i64>,
    topk_weights: CudaSlice<f32>,
    owner: CudaSlice<u32>,
    x: CudaSlice<u8>,
}

/// Where tokens go.
struct Plan {
    lists: CudaSlice<u32>,
    slots: CudaSlice<i32>,
    counts: CudaSlice<u32>,
    arriving: CudaSlice<u32>,
    /// By peer, the rows sent to it, in the order of sending; once planned.
    sent: Vec<Range<usize>>,
    /// By peer, the rows that come from it.
    received: Vec<Range<usize>>,
}

/// Rows under way. Room for them is exact.
struct Rows {
    packed: CudaSlice<u8>,
    packed_meta: CudaSlice<u32>,
    x: CudaSlice<u8>,
    meta: CudaSlice<u32>,
    returned: CudaSlice<u8>,
    out: CudaSlice<u8>,
}

impl<'a> Device<'a> {
    fn new(job: &'a Job<'a>, rank: usize, ordinal: usize) -> Result<Self, String> {
        let context = CudaContext::new(ordinal).map_err(driver("the device can't be opened"))?;
        // SAFETY: everything of a rank is used on its only stream, in order.
        unsafe { context.disable_event_tracking() };
        let capability = context.compute_capability().map_err(driver("its compute capability"))?;
        let kernels = Kernels::load(&context, compile(capability)?).map_err(driver("kernels"))?;
        let make = || -> Result<Self, DriverError> {
            let stream = context.new_stream()?;
            let done = context.new_event(None)?;
            let given = Given::new(job, rank, &stream)?;
            let (plan, rows) = (Plan::new(job, &stream)?, Rows::new(job, rank, &stream)?);
            stream.synchronize()?;
            Ok(Self { job, rank, stream, done, kernels, given, plan, rows })
        };
        make().map_err(driver("memory of the device"))
    }

    /// Waits until all that was enqueued has ended: not longer than the deadline, for a peer may never come.
    fn finish(&self) -> Result<(), String> {
        self.done.record(&self.stream).map_err(driver("cuEventRecord"))?;
        let started = Instant::now();
        while !self.done.try_is_complete().map_err(driver("the device has failed"))? {
            if started.elapsed() > self.job.deadline {
                return Err(format!("rank {}: the device has not ended within the deadline", self.rank));
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Enqueues what finds out where tokens go.
    fn count(&mut self) -> Result<(), DriverError> {
        let (Given { topk_idx, owner, .. }, plan) = (&self.given, &mut self.plan);
        let (tokens, topk) = (self.job.tokens() as u32, self.job.topk as u32);
        let shape = launch([self.job.ranks as u32, 1], COUNT_THREADS);
        let mut count = self.stream.launch_builder(&self.kernels.count);
        count.arg(topk_idx).arg(owner).arg(&tokens).arg(&topk);
        count.arg(&mut plan.lists).arg(&mut plan.slots).arg(&mut plan.counts);
        // SAFETY: the arguments are the kernel's, the arrays as large as it says for so many tokens and ranks.
        unsafe { count.launch(shape) }.map(drop)
    }

    /// Enqueues the copies of the tokens in the order of sending.
    fn pack(&mut self) -> Result<(), DriverError> {
        let (Given { topk_idx, topk_weights, x, .. }, plan) = (&self.given, &self.plan);
        let (tokens, topk) = (self.job.tokens() as u32, self.job.topk as u32);
        let vectors = (self.job.row_bytes() / 16) as u32;
        let shape = launch([tokens, self.job.ranks as u32], ROW_THREADS);
        let mut pack = self.stream.launch_builder(&self.kernels.pack);
        pack.arg(x).arg(topk_idx).arg(topk_weights).arg(&plan.lists).arg(&plan.counts);
        pack.arg(&tokens).arg(&topk).arg(&vectors).arg(&mut self.rows.packed).arg(&mut self.rows.packed_meta);
        // SAFETY: as in `count`; rows are whole vectors of 16 bytes.
        unsafe { pack.launch(shape) }.map(drop)
    }

    /// Enqueues the sums of what has come back.
    fn sum(&mut self) -> Result<(), DriverError> {
        let (ranks, vectors) = (self.job.ranks as u32, (self.job.row_bytes() / 16) as u32);
        let shape = launch([self.job.tokens() as u32, 1], ROW_THREADS);
        let mut sum = self.stream.launch_builder(&self.kernels.sum);
        sum.arg(&self.rows.returned).arg(&self.plan.slots).arg(&self.plan.counts);
        sum.arg(&ranks).arg(&vectors).arg(&mut self.rows.out);
        // SAFETY: as in `pack`; a token has at most 32 entries, hence rows.
        unsafe { sum.launch(shape) }.map(drop)
    }
}

fn launch([x, y]: [u32; 2], threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (x, y, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

impl Kernels {
    fn load(context: &Arc<CudaContext>, cubin: Vec<u8>) -> Result<Self, DriverError> {
        let module = context.load_module(Ptx::from_binary(cubin))?;
        let [count, pack, sum] = ["count", "pack", "sum"].map(|name| module.load_function(name));
        Ok(Self { count: count?, pack: pack?, sum: sum? })
    }
}

impl Given {
    fn new(job: &Job<'_>, rank: usize, stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        Ok(Self {
            topk_idx: stream.clone_htod(&job.topk_idx[rank])?,
            topk_weights: stream.clone_htod(&job.topk_weights[rank])?,
            owner: stream.clone_htod(&job.owner)?,
            x: stream.clone_htod(bytemuck::cast_slice::<_, u8>(&job.x))?,
        })
    }
}

impl Plan {
    fn new(job: &Job<'_>, stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        let pairs = job.tokens() * job.ranks;
        Ok(Self {
            lists: stream.alloc_zeros(pairs)?,
            slots: stream.alloc_zeros(pairs)?,
            counts: stream.alloc_zeros(job.ranks)?,
            arriving: stream.alloc_zeros(job.ranks)?,
            sent: Vec::new(),
            received: Vec::new(),
        })
    }
}

impl Rows {
    fn new(job: &Job<'_>, rank: usize, stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        let sent: usize = (0..job.ranks).map(|peer| job.rows(rank, peer)).sum();
        // A rank that receives nothing has room for a row that never comes.
        let received = (0..job.ranks).map(|peer| job.rows(peer, rank)).sum::<usize>().max(1);
        let (bytes, meta) = (job.row_bytes(), 2 * job.topk);
        Ok(Self {
            packed: stream.alloc_zeros(sent * bytes)?,
            packed_meta: stream.alloc_zeros(sent * meta)?,
            x: stream.alloc_zeros(received * bytes)?,
            meta: stream.alloc_zeros(received * meta)?,
            returned: stream.alloc_zeros(sent * bytes)?,
            out: stream.alloc_zeros(job.tokens() * bytes)?,
        })
    }
}

/// A rank of the world.
struct Rank<'a> {
    // Dropped first: it may still use the memory.
    comm: Comm,
    device: Device<'a>,
}

impl<'a> Rank<'a> {
    /// Collective.
    fn join(device: Device<'a>, id: Id) -> Result<Self, String> {
        let Device { rank, job, stream, .. } = &device;
        // NCCL takes the device whose context is current.
        stream.context().bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        let comm = Comm::from_rank(stream.clone(), *rank, job.ranks, id).map_err(nccl("ncclCommInitRank"))?;
        Ok(Self { comm, device })
    }

    /// The phases with a meeting around each, then all without.
    fn iteration(&mut self, meeting: &mut Meeting) -> Result<[Duration; 4], String> {
        let ((), plan) = meeting.timed(|| self.plan())?;
        let ((), dispatch) = meeting.timed(|| self.dispatch().and_then(|()| self.device.finish()))?;
        let ((), combine) = meeting.timed(|| self.combine().and_then(|()| self.device.finish()))?;
        let whole = || {
            self.plan()?;
            self.dispatch()?;
            self.combine()?;
            self.device.finish()
        };
        let ((), total) = meeting.timed(whole)?;
        Ok([plan, dispatch, combine, total])
    }

    fn plan(&mut self) -> Result<(), String> {
        self.device.count().map_err(driver("count"))?;
        let ranks = self.device.job.ranks;
        let each: Vec<_> = (0..ranks).map(|peer| peer..peer + 1).collect();
        let plan = &mut self.device.plan;
        grouped(|| exchange(&self.comm, (&plan.counts, &each), (&mut plan.arriving, &each), 1))?;
        self.device.finish()?;
        let download = |counts| -> Result<_, String> {
            let counts = self.device.stream.clone_dtoh(counts).map_err(driver("counts"))?;
            self.device.stream.synchronize().map_err(driver("counts"))?;
            Ok(ranges(&counts))
        };
        let (sent, received) = (download(&self.device.plan.counts)?, download(&self.device.plan.arriving)?);
        (self.device.plan.sent, self.device.plan.received) = (sent, received);
        Ok(())
    }

    fn dispatch(&mut self) -> Result<(), String> {
        self.device.pack().map_err(driver("pack"))?;
        let Device { plan, rows, job, .. } = &mut self.device;
        let Plan { sent, received, .. } = plan;
        grouped(|| {
            exchange(&self.comm, (&rows.packed, sent), (&mut rows.x, received), job.row_bytes())?;
            exchange(&self.comm, (&rows.packed_meta, sent), (&mut rows.meta, received), 2 * job.topk)
        })
    }

    fn combine(&mut self) -> Result<(), String> {
        let Device { plan, rows, job, .. } = &mut self.device;
        let Plan { sent, received, .. } = plan;
        grouped(|| exchange(&self.comm, (&rows.x, received), (&mut rows.returned, sent), job.row_bytes()))?;
        self.device.sum().map_err(driver("sum"))
    }

    /// Compares all that came with what it must be.
    fn verify(&self) -> Result<(), String> {
        let Device { job, rank, stream, rows, .. } = &self.device;
        let download = |what: &CudaSlice<u8>| -> Result<Vec<u8>, String> {
            let bytes = stream.clone_dtoh(what).map_err(driver("results"))?;
            stream.synchronize().map_err(driver("results"))?;
            Ok(bytes)
        };
        let wrong =
            |what: &str, place: String| Err(format!("rank {rank}: {what} of the baseline is wrong: {place}"));
        let (x, out) = (download(&rows.x)?, download(&rows.out)?);
        let row = |token: usize| &job.x[token * job.hidden..][..job.hidden];
        let mut arrived = x.chunks_exact(job.row_bytes());
        for (home, token) in (0..job.ranks).flat_map(|home| (0..job.tokens()).map(move |token| (home, token)))
        {
            let here = job.targets(home, token).contains(rank);
            if here && arrived.next() != Some(bytemuck::cast_slice(row(token))) {
                return wrong("a row", format!("token {token} of rank {home}"));
            }
        }
        for (token, sums) in out.chunks_exact(job.row_bytes()).enumerate() {
            let copies = job.targets(*rank, token).len();
            let sum = |x: &bf16| bf16::from_f32((0..copies).fold(0.0, |sum, _| sum + x.to_f32()));
            if !row(token).iter().map(sum).eq(sums.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])))
            {
                return wrong("a sum", format!("token {token}"));
            }
        }
        Ok(())
    }
}

/// `counts` one after the other.
fn ranges(counts: &[u32]) -> Vec<Range<usize>> {
    let next = |end: &mut usize, &count: &u32| {
        let start = *end;
        *end += count as usize;
        Some(start..*end)
    };
    counts.iter().scan(0, next).collect()
}

/// What is sent and received inside is one exchange: neither waits for the other.
fn grouped(issue: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    group_start().map_err(nccl("ncclGroupStart"))?;
    let issued = issue();
    let ended = group_end().map_err(nccl("ncclGroupEnd"));
    issued.and(ended.map(drop))
}

/// Sends each peer its rows of `pitch` elements, and receives what it sends. Both ends know the counts: nothing is
/// neither sent nor received.
fn exchange<T: NcclType>(
    comm: &Comm,
    (from, sent): (&CudaSlice<T>, &[Range<usize>]),
    (to, received): (&mut CudaSlice<T>, &[Range<usize>]),
    pitch: usize,
) -> Result<(), String> {
    let elements = |rows: &Range<usize>| rows.start * pitch..rows.end * pitch;
    for (peer, (sent, received)) in sent.iter().zip(received).enumerate() {
        if !sent.is_empty() {
            comm.send(&from.slice(elements(sent)), peer as i32).map_err(nccl("ncclSend"))?;
        }
        if !received.is_empty() {
            comm.recv(&mut to.slice_mut(elements(received)), peer as i32).map_err(nccl("ncclRecv"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_of_nccl_is_asked_for_beforehand() {
        let named = include_str!("nccl.rs")
            .split('"')
            .filter(|text| text.starts_with("nccl") && text.chars().all(char::is_alphanumeric));
        let named: BTreeSet<_> = named.filter(|text| *text != "nccl").collect();
        assert_eq!(named, SYMBOLS.into_iter().collect());
    }

    #[test]
    fn its_kernels_compile() {
        // SAFETY: as in `require_libraries`.
        match unsafe { compiler::is_culib_present() } {
            true => assert!(compile((9, 0)).unwrap().starts_with(b"\x7fELF")),
            false => println!("no NVRTC here"),
        }
    }

    #[test]
    fn counts_are_ranges_one_after_the_other() {
        assert_eq!(ranges(&[2, 0, 3]), [0..2, 2..2, 2..5]);
    }

    #[test]
    fn rows_go_once_to_each_rank() {
        let (topk_idx, topk_weights) = ([vec![0, 1, 2, 3], vec![3, 2, 0, 3]], [vec![0.5; 4], vec![0.5; 4]]);
        let job = Job {
            devices: Vec::new(),
            owner: vec![0, 0, 1, 1],
            ranks: 2,
            hidden: 8,
            topk: 2,
            topk_idx: &topk_idx,
            topk_weights: &topk_weights,
            x: vec![bf16::ONE; 16],
            iters: 1,
            deadline: Duration::from_secs(1),
        };
        assert_eq!((job.tokens(), job.row_bytes()), (2, 16));
        assert_eq!(
            [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(home, target)| job.rows(home, target)),
            [1, 1, 1, 2]
        );
    }
}
