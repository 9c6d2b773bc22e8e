//! The shim's shared library: built when its sources are newer, bound by hand.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use libloading::Library;

/// `ShimOptions` of `kernels/shim/shim.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    pub seed: u64,
    /// Blocks of a rank that run at a time; 0: all.
    pub resident: u32,
    pub tsan_per_warp: u32,
    pub ranks_per_node: u32,
    /// Time is real, and other threads take part: see [`LiveShim`].
    pub live: u32,
}

/// `ShimPosting` of `kernels/shim/shim.h`.
#[repr(C)]
pub struct ShimPosting {
    pub peer: u32,
    pub queue: u32,
    pub src: *const c_void,
    pub dst: *mut c_void,
    pub bytes: u64,
    pub word: *mut u64,
    pub value: u64,
    pub completion: *mut u64,
    pub completed: u64,
}

/// What the shim calls for every command.
pub type Resolve = unsafe extern "C" fn(*mut c_void, u32, u64, u64, *mut ShimPosting);

/// Bytes that a shim counts, by memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    BulkRead = 0,
    BulkWritten = 1,
    NicRead = 2,
    NicWritten = 3,
}

struct Functions {
    new: unsafe extern "C" fn(*const Options) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void),
    memory: unsafe extern "C" fn(*mut c_void, u32, *mut c_void, u64, u32) -> u32,
    launch: unsafe extern "C" fn(
        *mut c_void,
        u32,
        u32,
        *const c_char,
        u32,
        u32,
        u32,
        *const c_void,
        u64,
    ) -> c_int,
    wait: unsafe extern "C" fn(*mut c_void, u32, u32, u32, u32, u64),
    ended: unsafe extern "C" fn(*mut c_void, u32, u32) -> u64,
    stop: unsafe extern "C" fn(*mut c_void),
    proxy: unsafe extern "C" fn(*mut c_void, u32, *mut u64, u64, *mut u64, Resolve, *mut c_void),
    lose: unsafe extern "C" fn(*mut c_void, *mut u64),
    run: unsafe extern "C" fn(*mut c_void) -> c_int,
    report: unsafe extern "C" fn(*mut c_void) -> *const c_char,
    stall: unsafe extern "C" fn(*mut c_void) -> *const c_char,
    traffic: unsafe extern "C" fn(*mut c_void, u32, u32) -> u64,
}

/// The library named by RAILHOP_SHIM, or the plain flavour, built here.
fn functions() -> &'static Functions {
    static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
    FUNCTIONS.get_or_init(|| {
        let path = std::env::var_os("RAILHOP_SHIM").map_or_else(build, PathBuf::from);
        // SAFETY: the library's initialisers only register kernels. It is never unloaded.
        let library = Box::leak(Box::new(unsafe { Library::new(&path) }.expect("the shim loads")));
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the types are those of `shim.h`.
                *unsafe { library.get(concat!("railhop_shim_", $name).as_bytes()) }.expect($name)
            };
        }
        Functions {
            new: symbol!("new"),
            free: symbol!("free"),
            memory: symbol!("memory"),
            launch: symbol!("launch"),
            wait: symbol!("wait"),
            ended: symbol!("ended"),
            stop: symbol!("stop"),
            proxy: symbol!("proxy"),
            lose: symbol!("lose"),
            run: symbol!("run"),
            report: symbol!("report"),
            stall: symbol!("stall"),
            traffic: symbol!("traffic"),
        }
    })
}

/// The plain flavour.
fn build() -> PathBuf {
    built("target/shim/plain.so", Command::new(root().join("kernels/shim/build")).arg("plain"))
}

/// The folder of a CUDA driver that stands on the shim.
pub fn cuda_folder() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let build =
        || built("target/shim/cuda/libcuda.so.1", &mut Command::new(root().join("kernels/shim/cuda/build")));
    FOLDER.get_or_init(|| build().parent().expect("a folder").to_path_buf()).clone()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A library, built by `command` unless it is newer than every source.
fn built(library: &str, command: &mut Command) -> PathBuf {
    let library = root().join(library);
    let changed =
        |path: &Path| path.metadata().and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    if !library.exists() || changed(&library) < newest(&root().join("kernels"), &changed) {
        assert!(command.status().expect("the build runs").success(), "{} builds", library.display());
    }
    library
}

fn newest(folder: &Path, changed: &impl Fn(&Path) -> SystemTime) -> SystemTime {
    let entries = folder.read_dir().expect("a folder of the repository");
    let times = entries.map(|entry| entry.expect("an entry").path()).map(|path| match path.is_dir() {
        true => newest(&path, changed),
        false => changed(&path),
    });
    times.max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// A simulated machine.
pub struct Shim(*mut c_void);

impl Shim {
    pub fn new(options: Options) -> Self {
        // SAFETY: the options are read before the call returns.
        Self(unsafe { (functions().new)(&options) })
    }

    /// Registers memory that stays where it is as long as the shim lives; its id.
    pub fn memory(&self, rank: usize, address: u64, bytes: usize, shared: bool) -> u32 {
        // SAFETY: whoever owns the memory keeps it, see `Machine`.
        unsafe {
            (functions().memory)(self.0, rank as u32, address as *mut c_void, bytes as u64, shared.into())
        }
    }

    /// Queues a kernel.
    pub fn launch<P: bytemuck::Pod>(&self, rank: usize, stream: usize, kernel: &str, grid: Grid, params: &P) {
        assert!(
            self.try_launch(rank, stream, kernel, grid, bytemuck::bytes_of(params)),
            "{kernel} can't be launched"
        );
    }

    /// Queues a kernel; whether there is such a kernel, with such parameters and launched so.
    pub fn try_launch(&self, rank: usize, stream: usize, kernel: &str, grid: Grid, params: &[u8]) -> bool {
        let name = CString::new(kernel).unwrap();
        let Grid { blocks, warps, shared } = grid;
        let (params, bytes) = (params.as_ptr().cast(), params.len() as u64);
        let (rank, stream, blocks, threads) = (rank as u32, stream as u32, blocks as u32, 32 * warps as u32);
        // SAFETY: the name and the parameters are copied before the call returns.
        let status = unsafe {
            (functions().launch)(
                self.0,
                rank,
                stream,
                name.as_ptr(),
                blocks,
                threads,
                shared as u32,
                params,
                bytes,
            )
        };
        status == 0
    }

    /// # Safety
    /// `context` is what `resolve` expects, and outlives the shim.
    pub unsafe fn proxy(
        &self,
        rank: usize,
        queue: (u64, usize),
        taken: u64,
        resolve: Resolve,
        context: *mut c_void,
    ) {
        let (rank, capacity) = (rank as u32, queue.1 as u64);
        // SAFETY: the caller's.
        unsafe {
            (functions().proxy)(
                self.0,
                rank,
                queue.0 as *mut u64,
                capacity,
                taken as *mut u64,
                resolve,
                context,
            )
        }
    }

    /// Loses all signals to the word at `address` from now on.
    pub fn lose(&self, address: u64) {
        // SAFETY: the address is compared, never read.
        unsafe { (functions().lose)(self.0, address as *mut u64) }
    }

    /// Runs all that was launched.
    pub fn run(&self) -> Result<(), String> {
        // SAFETY: all memory that kernels were told of is registered and owned by whoever owns the shim.
        match unsafe { (functions().run)(self.0) } {
            0 => Ok(()),
            // SAFETY: the report is a C string until the next call.
            _ => Err(unsafe { CStr::from_ptr((functions().report)(self.0)) }.to_string_lossy().into_owned()),
        }
    }

    /// Where everybody was when the last run first stood still.
    pub fn stall(&self) -> String {
        // SAFETY: the report is a C string until the next call.
        unsafe { CStr::from_ptr((functions().stall)(self.0)) }.to_string_lossy().into_owned()
    }

    pub fn traffic(&self, memory: u32, what: Traffic) -> usize {
        // SAFETY: any number is a memory, or none.
        unsafe { (functions().traffic)(self.0, memory, what as u32) as usize }
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once.
        unsafe { (functions().free)(self.0) }
    }
}

/// A machine that one thread runs in real time while others use it.
pub struct LiveShim {
    shim: Shim,
    running: Mutex<()>,
}

// SAFETY: a shim is tied to no thread.
unsafe impl Send for LiveShim {}
// SAFETY: only `run` is for one thread at a time, and holds the lock. `shim.h` names what is called meanwhile: that is
// all that the other methods call. Nobody frees it while it is borrowed.
unsafe impl Sync for LiveShim {}

impl LiveShim {
    pub fn new(seed: u64, ranks_per_node: usize) -> Self {
        let ranks_per_node = ranks_per_node as u32;
        let options = Options { seed, ranks_per_node, live: 1, ..Options::default() };
        Self { shim: Shim::new(options), running: Mutex::new(()) }
    }

    /// Registers memory that stays where it is as long as the shim lives.
    pub fn memory(&self, rank: usize, address: u64, bytes: usize, shared: bool) {
        self.shim.memory(rank, address, bytes, shared);
    }

    /// Queues a kernel; whether there is such a kernel, with such parameters and launched so.
    pub fn launch(&self, rank: usize, stream: usize, kernel: &str, grid: Grid, params: &[u8]) -> bool {
        self.shim.try_launch(rank, stream, kernel, grid, params)
    }

    /// Queues an entry on `stream` that ends when `count` entries of `other` have ended. Streams are ranks and numbers.
    pub fn wait(&self, stream: (usize, usize), other: (usize, usize), count: u64) {
        let (rank, stream) = (stream.0 as u32, stream.1 as u32);
        let other = (other.0 as u32, other.1 as u32);
        // SAFETY: any numbers are streams.
        unsafe { (functions().wait)(self.shim.0, rank, stream, other.0, other.1, count) }
    }

    /// Entries of a stream that have ended. All that they wrote is visible to the caller.
    pub fn ended(&self, rank: usize, stream: usize) -> u64 {
        // SAFETY: any number is a stream.
        unsafe { (functions().ended)(self.shim.0, rank as u32, stream as u32) }
    }

    /// Runs what is launched until `stop` is called, or a check fails.
    pub fn run(&self) -> Result<(), String> {
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        self.shim.run()
    }

    /// Ends `run`, whatever still runs.
    pub fn stop(&self) {
        // SAFETY: the shim lives.
        unsafe { (functions().stop)(self.shim.0) }
    }
}

/// A launch's shape.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    pub blocks: usize,
    pub warps: usize,
    /// Bytes of shared memory of a block.
    pub shared: usize,
}
