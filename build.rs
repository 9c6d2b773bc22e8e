//! Compiles the kernels where nvcc is, and embeds their sources for NVRTC where it is not. It never fails: a build
//! without CUDA is a whole one, which compiles the kernels when it first meets a device.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Cubins for the architectures that `ci/kernels.py` checks, each for its family where there is one, and PTX for
/// those to come.
const TARGETS: [&str; 4] = [
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100f,code=sm_100f",
    "-gencode=arch=compute_120f,code=sm_120f",
    "-gencode=arch=compute_90,code=compute_90",
];

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let kernels = root.join("kernels");
    println!("cargo::rerun-if-changed=build.rs");
    let sources = sources(&kernels);
    for name in &sources {
        println!("cargo::rerun-if-changed={}", kernels.join(name).display());
    }
    fs::write(out.join("kernel_sources.rs"), list(&kernels, &sources)).expect("OUT_DIR can be written");

    let image = out.join("railhop.fatbin");
    let compiled = nvcc().is_some_and(|nvcc| compile(&nvcc, &kernels.join("railhop.cu"), &image));
    if !compiled {
        fs::write(&image, []).expect("OUT_DIR can be written");
    }
}

/// What the kernels are made of, by the names under which they include each other.
fn sources(kernels: &Path) -> Vec<String> {
    let files = fs::read_dir(kernels).expect("kernels is part of the sources");
    let names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.ends_with(".cu") || name.ends_with(".cuh")).collect();
    names.push("generated/wire.cuh".to_string());
    names.sort();
    names
}

/// The sources as a Rust expression: an array of (name, text).
fn list(kernels: &Path, names: &[String]) -> String {
    let entry = |name: &String| format!("    ({name:?}, include_str!({:?})),\n", kernels.join(name));
    format!("[\n{}]\n", names.iter().map(entry).collect::<String>())
}

/// The compiler: `RAILHOP_NVCC`, else that of `CUDA_HOME` or `CUDA_PATH`, else the first in `PATH`. An empty
/// `RAILHOP_NVCC`, or `none`, is none.
fn nvcc() -> Option<PathBuf> {
    // Not PATH: it differs between a shell and an editor, and each would have the other build again.
    for name in ["RAILHOP_NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let found = match env::var_os("RAILHOP_NVCC") {
        Some(chosen) if chosen.is_empty() || chosen == "none" => None,
        Some(chosen) => Some(PathBuf::from(chosen)),
        None => {
            let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
            let homes = homes.map(|home| Path::new(&home).join("bin"));
            let path = env::var_os("PATH").unwrap_or_default();
            let candidates = homes.chain(env::split_paths(&path)).map(|folder| folder.join("nvcc"));
            candidates.into_iter().find(|nvcc| nvcc.is_file())
        }
    }?;
    // Cargo takes a missing file, and the bare name of a program, for one that changes all the time.
    if found.is_file() {
        println!("cargo::rerun-if-changed={}", found.display());
    }
    Some(found)
}

/// Compiles `source` to `image`; whether that went well.
fn compile(nvcc: &Path, source: &Path, image: &Path) -> bool {
    let mut command = Command::new(nvcc);
    command.args(["-std=c++20", "-O3", "-fatbin", "--compress-mode=size", "--threads=0"]).args(TARGETS);
    let said = match command.arg("-o").arg(image).arg(source).output() {
        Ok(done) if done.status.success() => return true,
        Ok(done) => {
            [done.stdout, done.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat()
        }
        Err(error) => error.to_string(),
    };
    println!("cargo::warning=the kernels are not embedded: {} failed", nvcc.display());
    for line in said.lines().filter(|line| !line.trim().is_empty()).take(20) {
        println!("cargo::warning={line}");
    }
    false
}
