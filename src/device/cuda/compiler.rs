//! NVRTC: compiles the kernels on the machine that runs them.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char};
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};

use super::cache::{self, Hash};
use crate::error::DeviceError;

/// (name, text) of all that the kernels are made of.
const SOURCES: &[(&str, &str)] = &include!(concat!(env!("OUT_DIR"), "/kernel_sources.rs"));

/// The source that includes all others.
const MAIN: &str = "railhop.cu";

/// The dialect, as `build.rs` has it.
const DIALECT: &str = "--std=c++20";

/// All functions used; cudarc panics where one is missing.
const SYMBOLS: [&str; 9] = [
    "nvrtcCompileProgram",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetCUBIN",
    "nvrtcGetCUBINSize",
    "nvrtcGetErrorString",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
    "nvrtcVersion",
];

/// A cubin of the kernels for `target`, such as `sm_90a`, from the cache in `folder` where it has one.
pub(super) fn compile_cached(target: &str, folder: Option<&Path>) -> Result<Vec<u8>, DeviceError> {
    // Others of the process who want the same find it compiled.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (major, minor) = version()?;
    cache::fetch(folder, &entry(target, &format!("{major}.{minor}"), SOURCES), || compile(target))
}

/// The name of a cache entry: different for all that may compile to something else.
fn entry(target: &str, version: &str, sources: &[(&str, &str)]) -> String {
    let hash = Hash::new().text(DIALECT).text(version).text(target);
    let hash = sources.iter().fold(hash, |hash, (name, text)| hash.text(name).text(text));
    format!("{target}-{:032x}.cubin", hash.value())
}

/// Compiles the kernels for `target`, such as `sm_90a`: a cubin. No driver is needed.
///
/// # Errors
/// [`DeviceError::NoCompiler`] where NVRTC is not installed, [`DeviceError::Compile`] where it knows no such target.
pub fn compile(target: &str) -> Result<Vec<u8>, DeviceError> {
    version()?;
    let failed = |log: String| DeviceError::Compile { target: target.to_string(), log };
    let architecture = c_string(&format!("--gpu-architecture={target}")).map_err(failed)?;
    let program = Program::new().map_err(failed)?;
    program.compile(&[&c_string(DIALECT).map_err(failed)?, &architecture]).map_err(failed)?;
    program.cubin().map_err(failed)
}

/// The version of NVRTC, which from now on can be called.
fn version() -> Result<(i32, i32), DeviceError> {
    // SAFETY: opening the library runs its initialisers, which depend on nothing of this process.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoCompiler("libnvrtc is not found".to_string()));
    }
    // SAFETY: `culib` panics only where there is no library.
    let library = unsafe { sys::culib() };
    for symbol in SYMBOLS {
        // SAFETY: looked at, never called by this type.
        if unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_err() {
            return Err(DeviceError::NoCompiler(format!("libnvrtc lacks {symbol}")));
        }
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the call writes two integers.
    check(unsafe { sys::nvrtcVersion(&mut major, &mut minor) }).map_err(DeviceError::NoCompiler)?;
    Ok((major, minor))
}

fn check(result: nvrtcResult) -> Result<(), String> {
    if result == nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: a string that lives as long as the process, for any result.
    Err(unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) }.to_string_lossy().into_owned())
}

fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|error| error.to_string())
}

/// A program of NVRTC's. Its methods need NVRTC to be there, which [`version`] has seen.
struct Program(nvrtcProgram);

impl Program {
    /// The kernels.
    fn new() -> Result<Self, String> {
        let headers: Vec<_> = SOURCES.iter().filter(|(name, _)| *name != MAIN).collect();
        let main =
            SOURCES.iter().find(|(name, _)| *name == MAIN).ok_or("the kernels are not in this build")?;
        let names = headers.iter().map(|(name, _)| c_string(name)).collect::<Result<Vec<_>, _>>()?;
        let texts = headers.iter().map(|(_, text)| c_string(text)).collect::<Result<Vec<_>, _>>()?;
        let (name, text) = (c_string(main.0)?, c_string(main.1)?);
        let (names_at, texts_at) = (pointers(&names), pointers(&texts));
        let mut program = ptr::null_mut();
        // SAFETY: the call writes a handle; it copies the texts, which are there until it returns.
        check(unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                names_at.len() as i32,
                texts_at.as_ptr(),
                names_at.as_ptr(),
            )
        })?;
        Ok(Self(program))
    }

    fn compile(&self, options: &[&CStr]) -> Result<(), String> {
        let options = pointers(options);
        // SAFETY: the program is alive; the options are there until the call returns.
        let result = unsafe { sys::nvrtcCompileProgram(self.0, options.len() as i32, options.as_ptr()) };
        check(result).map_err(|error| match self.log() {
            Some(log) => format!("{error}\n{log}"),
            None => error,
        })
    }

    /// What the compiler says; none where that is nothing.
    fn log(&self) -> Option<String> {
        let mut size = 0;
        // SAFETY: the program is alive, and the call writes a size.
        check(unsafe { sys::nvrtcGetProgramLogSize(self.0, &mut size) }).ok()?;
        let mut log = vec![0u8; size];
        // SAFETY: there is room for so many characters, the final 0 among them.
        check(unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) }).ok()?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().to_string();
        (!log.is_empty()).then_some(log)
    }

    fn cubin(&self) -> Result<Vec<u8>, String> {
        let mut size = 0;
        // SAFETY: the program is alive, and the call writes a size.
        check(unsafe { sys::nvrtcGetCUBINSize(self.0, &mut size) })?;
        let mut cubin = vec![0u8; size];
        // SAFETY: there is room for so many bytes.
        check(unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()) })?;
        if cubin.is_empty() { Err("a virtual architecture gives no cubin".to_string()) } else { Ok(cubin) }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn pointers<T: AsRef<CStr>>(texts: &[T]) -> Vec<*const c_char> {
    texts.iter().map(|text| text.as_ref().as_ptr()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_include_is_among_the_sources() {
        let known = |name: &str| SOURCES.iter().any(|(known, _)| *known == name);
        assert!(known(MAIN));
        for (source, text) in SOURCES {
            for line in text.lines().filter_map(|line| line.strip_prefix("#include \"")) {
                let name = line.trim_end_matches('"');
                // The shim's is for other compilers.
                assert!(known(name) || name == "shim/ptx.hpp", "{source} includes {name}");
            }
        }
    }

    #[test]
    fn entries_differ_in_all_that_matters() {
        let sources = [("a", "1"), ("b", "2")];
        let name = entry("sm_90a", "13.0", &sources);
        // Fixed: other processes look for it.
        assert_eq!(name, entry("sm_90a", "13.0", &sources));
        assert!(name.starts_with("sm_90a-") && name.len() == "sm_90a-.cubin".len() + 32);
        assert_ne!(name[7..], entry("sm_100a", "13.0", &sources)[8..]);
        assert_ne!(name, entry("sm_90a", "13.1", &sources));
        assert_ne!(name, entry("sm_90a", "13.0", &[("a", "1"), ("b", "3")]));
        assert_ne!(name, entry("sm_90a", "13.0", &[("a", "1"), ("c", "2")]));
    }

    #[test]
    fn the_cache_holds_what_the_compiler_makes() {
        let folder = tempfile::tempdir().unwrap();
        match compile_cached("sm_90a", Some(folder.path())) {
            Ok(cubin) => {
                assert!(cubin.starts_with(b"\x7fELF"));
                assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
                assert_eq!(compile_cached("sm_90a", Some(folder.path())), Ok(cubin));
            }
            Err(DeviceError::NoCompiler(_)) => println!("no NVRTC here"),
            Err(error) => panic!("{error}"),
        }
    }
}
