//! The `railhop` command, run as its users run it.

#![cfg(feature = "cli")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/small.safetensors");

/// `railhop replay` of `trace` on 2×4 ranks, with `options`, the first of which may be another world.
fn replay(trace: impl AsRef<Path>, options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_railhop"));
    command.arg("replay").arg(trace.as_ref()).env_remove("RAILHOP_LOG");
    if !options.contains(&"--nodes") {
        command.args(["--nodes", "2", "--ranks-per-node", "4"]);
    }
    if !options.contains(&"--tokens-per-rank") {
        command.args(["--tokens-per-rank", "64"]);
    }
    command.args(options).output().unwrap()
}

/// The JSON object that a replay prints.
fn report(options: &[&str]) -> Value {
    let output = replay(TRACE, &[options, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty());
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Fails with `code`, nothing on stdout, and one line on stderr that contains `cause`.
#[track_caller]
fn refused(trace: impl AsRef<Path>, options: &[&str], code: i32, cause: &str) {
    let output = replay(trace, options);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(output.stdout.is_empty());
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains(cause), "{stderr:?} has no {cause:?}");
}

#[test]
fn replays_in_every_format() {
    for (format, row, pitch) in [("bf16", 768, 848), ("f32", 400, 480), ("ue8m0", 400, 480)] {
        let fp8 = ["--dtype", "fp8", "--scales", format];
        let report = report(if format == "bf16" { &[] } else { &fp8 });
        assert!(report["format"].as_str().unwrap().contains(format));
        assert_eq!((&report["verified"], &report["steps"]), (&true.into(), &serde_json::json!([0, 4])));
        let rows: u64 = report["rows_per_rank"].as_array().unwrap().iter().filter_map(Value::as_u64).sum();
        let hops = &report["hops"];
        assert_eq!(hops["dispatch_hop2"]["rows"], rows);
        assert_eq!(hops["dispatch_hop2"]["logical_bytes"], rows * row);
        assert_eq!(hops["combine_hop2"]["logical_bytes"], rows * 768);
        let hop1 = &hops["dispatch_hop1"];
        assert_eq!(hop1["physical_bytes"], hop1["rows"].as_u64().unwrap() * pitch);
        assert!(hop1["physical_bytes"].as_u64() < hop1["physical_bytes_without_deduplication"].as_u64());
        assert!(report["skew"].as_f64().unwrap() > 1.0);
        for phase in ["plan", "dispatch", "combine"] {
            let times = &report["slowest_rank"][phase];
            assert!(times["sum_s"].as_f64() >= times["median_s"].as_f64());
            assert!(times["median_s"].as_f64().unwrap() > 0.0);
        }
    }
}

#[test]
fn ranks_without_tokens_take_part() {
    let world = ["--nodes", "3", "--ranks-per-node", "5", "--tokens-per-rank", "100"];
    assert_eq!(report(&world)["steps"], serde_json::json!([0, 2]));
    let alone = ["--nodes", "1", "--ranks-per-node", "1", "--tokens-per-rank", "18446744073709551615"];
    assert_eq!(report(&alone)["rows_per_rank"], serde_json::json!([2048]));
}

#[test]
fn tables_stay_narrow() {
    let world = ["--nodes", "1", "--ranks-per-node", "64", "--workers", "1", "--channels", "3"];
    let output = replay(TRACE, &world);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("ranks 56..64") && text.contains("without deduplication"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
}

#[test]
fn dumps_keep_the_numbers_of_their_steps() {
    let dir = tempfile::tempdir().unwrap();
    let dumps = dir.path().join("new/dumps");
    let options = ["--steps", "2:", "--dtype", "fp8", "--dump", dumps.to_str().unwrap()];
    let rows = report(&options)["rows_per_rank"].as_array().unwrap().len();
    let mut names: Vec<_> = std::fs::read_dir(&dumps)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [2, 3].map(|step| (0..rows).map(move |rank| format!("step{step}-rank{rank}.safetensors")));
    assert_eq!(names, expected.into_iter().flatten().collect::<Vec<_>>());
    for name in names {
        let bytes = std::fs::read(dumps.join(name)).unwrap();
        let dump = SafeTensors::deserialize(&bytes).unwrap();
        let rows = dump.tensor("recv_src_rank").unwrap().shape()[0];
        let codes = dump.tensor("recv_x").unwrap();
        assert_eq!((codes.dtype(), codes.shape()), (Dtype::U8, &[rows, 384][..]));
        assert_eq!(dump.tensor("recv_x_scales").unwrap().shape(), [rows, 3]);
        assert_eq!(dump.tensor("combined_x").unwrap().shape(), [64, 384]);
    }
}

#[test]
fn steps_outside_the_trace_are_refused() {
    for steps in ["0:5", "4:", "3:3", "3:1"] {
        refused(TRACE, &["--steps", steps], 1, "the trace has 4 steps");
    }
    for steps in ["3", "a:b", "1:2:3", "-1:2"] {
        refused(TRACE, &[&format!("--steps={steps}")], 2, "--steps");
    }
}

#[test]
fn worlds_that_cannot_work_are_refused_with_what_would() {
    let nodes = |nodes| ["--nodes", nodes, "--ranks-per-node", "4"];
    refused(TRACE, &nodes("0"), 1, "nodes = 0: a world has at least one node; 1 would work");
    refused(TRACE, &nodes("100000"), 1, "400000 ranks");
    refused(TRACE, &nodes("two"), 2, "--nodes");
    refused(TRACE, &["--nodes", "2"], 2, "--ranks-per-node");
    refused(TRACE, &["--tokens-per-rank", "0"], 1, "1 would work");
    refused(TRACE, &["--chunk-tokens", "12", "--ring-slots", "8"], 1, "16 would work");
    refused(TRACE, &["--workers", "0"], 1, "worker_budget = 0");
}

#[test]
fn foreign_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let whole = std::fs::read(TRACE).unwrap();
    refused(dir.path().join("none"), &[], 1, "can't read it");
    refused(file("empty", b""), &[], 1, "not a whole safetensors file");
    refused(file("text", b"no tensors\nin here\n"), &[], 1, "not a whole safetensors file");
    refused(file("cut", &whole[..whole.len() / 2]), &[], 1, "not a whole safetensors file");
    let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    let foreign = safetensors::serialize([("weight", view)], None).unwrap();
    refused(file("foreign", &foreign), &[], 1, "metadata num_experts is missing");
    refused(Small::default().write(&dir, "missing", Some("topk_idx")), &[], 1, "tensor topk_idx is missing");
    let hidden = Small { hidden: 4, ..Small::default() };
    refused(hidden.write(&dir, "hidden", None), &[], 1, "hidden = 4 is not a positive multiple of 8");
    let hidden = Small { hidden: 8, ..Small::default() };
    refused(hidden.write(&dir, "fp8", None), &["--dtype", "fp8"], 1, "multiple of 16");
}

#[test]
fn an_expert_out_of_range_is_named_once() {
    let dir = tempfile::tempdir().unwrap();
    for expert in [4, -2] {
        let mut small = Small::default();
        // Token 70 is token 6 of rank 1, in step 0.
        small.topk_idx[2 * 70 + 1] = expert;
        let trace = small.write(&dir, "trace", None);
        refused(&trace, &[], 1, &format!("step 0: rank 1: topk_idx[6][1] = {expert} is outside -1..4"));
        let alone = ["--nodes", "1", "--ranks-per-node", "1", "--tokens-per-rank", "10"];
        refused(&trace, &alone, 1, &format!("step 7: rank 0: topk_idx[0][1] = {expert} is outside"));
    }
}

#[test]
fn dumps_that_cannot_be_written_are_one_error() {
    let dir = tempfile::tempdir().unwrap();
    let occupied = dir.path().join("file");
    std::fs::write(&occupied, "").unwrap();
    refused(TRACE, &["--dump", occupied.to_str().unwrap()], 1, "file: ");
    // The name of one rank's dump is taken by a directory: all stop there.
    std::fs::create_dir(dir.path().join("step1-rank3.safetensors")).unwrap();
    refused(TRACE, &["--dump", dir.path().to_str().unwrap()], 1, "step 1: ");
}

#[test]
fn usage_errors_are_one_line() {
    for arguments in [&[][..], &["replay"], &["replay", TRACE, "--dtype", "fp4"], &["unpack"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_railhop")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(String::from_utf8(output.stderr).unwrap().lines().count(), 1);
    }
}

/// A small trace, to be spoilt.
struct Small {
    hidden: usize,
    topk_idx: Vec<i64>,
}

impl Default for Small {
    fn default() -> Self {
        Self { hidden: 16, topk_idx: (0..100).flat_map(|token| [token % 4, (token + 1) % 4]).collect() }
    }
}

impl Small {
    fn write(&self, dir: &tempfile::TempDir, name: &str, without: Option<&str>) -> PathBuf {
        let tokens = self.topk_idx.len() / 2;
        let x = vec![0; 2 * tokens * self.hidden];
        let weights = vec![0; 4 * self.topk_idx.len()];
        let idx: Vec<u8> = self.topk_idx.iter().flat_map(|expert| expert.to_le_bytes()).collect();
        let tensors = [
            ("x", TensorView::new(Dtype::BF16, vec![tokens, self.hidden], &x).unwrap()),
            ("topk_idx", TensorView::new(Dtype::I64, vec![tokens, 2], &idx).unwrap()),
            ("topk_weights", TensorView::new(Dtype::F32, vec![tokens, 2], &weights).unwrap()),
        ];
        let tensors = tensors.into_iter().filter(|(name, _)| Some(*name) != without);
        let metadata = [("num_experts", "4"), ("num_topk", "2")].map(|(k, v)| (k.to_string(), v.to_string()));
        let path = dir.path().join(format!("{name}.safetensors"));
        safetensors::serialize_to_file(tensors, Some(HashMap::from(metadata)), &path).unwrap();
        path
    }
}
