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

/// `railhop plan` of nodes × ranks with DeepSeek-V3's rows, and `options`.
fn plan(world: [&str; 2], options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_railhop"));
    command.args(["plan", "--nodes", world[0], "--ranks-per-node", world[1]]).env_remove("RAILHOP_LOG");
    command.args(["--hidden", "7168", "--topk", "8", "--experts", "256", "--format", "fp8"]);
    command.args(options).output().unwrap()
}

/// The JSON object that it prints.
fn planned(world: [&str; 2], options: &[&str]) -> Value {
    let output = plan(world, &[options, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn plans_say_what_they_chose_and_why() {
    let output = plan(["4", "8"], &[]);
    assert!(output.status.success() && output.stderr.is_empty());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    let report = planned(["4", "8"], &[]);
    let choices = report["choices"].as_object().unwrap();
    for (name, choice) in choices {
        let row = text.lines().find(|line| line.contains(&format!("│ {name} "))).unwrap();
        assert!(row.contains(&format!(" {} ", choice["value"])), "{row}");
        assert!(!choice["reason"].as_str().unwrap().is_empty() && choice["given"] == false);
    }
    for key in [
        "7.267 target ranks",
        "3.614 nodes",
        "2.711",
        "11.50 SMs of 16 GB/s",
        "7504 bytes",
        "500.0 kB in flight",
        "83.3 MB",
        "1.666 ms",
        "194.4 MB",
        "159.2 MB",
        "3.183 ms",
        "250.0 kB on hop 1",
        "320.0 kB on hop 2",
    ] {
        assert!(text.contains(key), "no {key}: {text}");
    }
    let memory = &report["memory"];
    for bytes in [&memory["region"]["bytes"], &memory["private"]["bytes"], &memory["handle"]] {
        assert!(text.contains(&format!(" {bytes} ")), "{text}");
    }
}

#[test]
fn plans_are_what_the_library_derives() {
    use railhop::budget::{Budget, Hardware, Overrides, Workload};
    use railhop::{RowFormat, RowShape, ScaleFormat, Topology};

    let report = planned(
        ["8", "8"],
        &["--tokens", "1000", "--scales", "ue8m0", "--node-limit", "4", "--hop1-gbs", "25", "--warps", "4"],
    );
    let shape = RowShape { hidden: 7168, topk: 8, format: RowFormat::Fp8(ScaleFormat::Ue8m0) };
    let workload =
        Workload { node_limit: Some(4), ..Workload::new(Topology::new(8, 8).unwrap(), shape, 256, 1000) };
    let hardware = Hardware { hop1_gbs: 25.0, ..Hardware::default() };
    let budget =
        Budget::new(&workload, &hardware, &Overrides { warps: Some(4), ..Overrides::default() }).unwrap();
    for choice in budget.choices() {
        let entry = &report["choices"][choice.name];
        assert_eq!((&entry["value"], &entry["reason"]), (&choice.value.into(), &(*choice.reason).into()));
        assert_eq!(entry["given"], choice.name == "warps");
    }
    let memory = budget.config_builder().build().unwrap().memory();
    let region = &report["memory"]["region"];
    assert_eq!((&region["rings"], &region["bytes"]), (&memory.rings.into(), &memory.region.into()));
    assert_eq!(report["memory"]["private"]["send_rings"], memory.rings);
    for (value, expected) in [
        (&report["targets_per_token"]["ranks"], budget.targets.ranks),
        (&report["dispatch"]["speed_of_light_ms"], budget.dispatch.light_seconds * 1e3),
    ] {
        assert!((value.as_f64().unwrap() / expected - 1.0).abs() < 1e-12);
    }
    assert_eq!(report["combine"]["hop2"]["bytes"], budget.combine.hop2.bytes.round() as u64);
    assert_eq!(report["bytes_in_flight"], serde_json::json!({ "hop1": 125_000, "hop2": 320_000 }));
    let alone = planned(["1", "1"], &[]);
    assert_eq!(
        (&alone["dispatch"]["hop1"]["bytes"], &alone["combine"]["hop2"]["bytes"]),
        (&0.into(), &0.into())
    );
}

#[test]
fn plans_that_cannot_work_name_the_field() {
    let refused = |options: &[&str], code: i32, cause: &str| {
        let output = plan(["4", "8"], options);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(code), 1), "{stderr}");
        assert!(output.stdout.is_empty() && stderr.contains(cause), "{stderr:?} has no {cause:?}");
    };
    refused(&["--blocks", "133"], 1, "blocks = 133: a block takes an SM, and there are 132; 132 would work");
    refused(&["--ring-slots", "12"], 1, "ring_slots = 12");
    refused(&["--chunk-tokens", "12", "--ring-slots", "8"], 1, "ring_slots = 8");
    refused(&["--shared-bytes", "3000"], 1, "shared_bytes = 3000");
    refused(&["--tokens", "0"], 1, "tokens = 0");
    refused(&["--node-limit", "0"], 1, "node_limit = 0");
    refused(&["--hop1-gbs", "0"], 1, "hop1_gbs = 0");
    refused(&["--sm-gbs=-1"], 1, "sm_gbs");
    refused(&["--hop2-gbs", "fast"], 2, "--hop2-gbs");
}

/// `railhop bench` of a small world, with `options`.
fn bench(options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_railhop"));
    command.args(["bench", "--nodes", "1", "--ranks-per-node", "2", "--tokens", "8", "--hidden", "64"]);
    command.args(["--experts", "4", "--topk", "2", "--iters", "1", "--workers", "1"]);
    command.args(options).env_remove("RAILHOP_LOG").output().unwrap()
}

/// Fails with `code` and one line on stderr that contains `cause`.
#[track_caller]
fn failed(output: &Output, code: i32, cause: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(code), 1), "{stderr}");
    assert!(output.stdout.is_empty());
    assert!(stderr.starts_with("error: ") && stderr.contains(cause), "{stderr:?} has no {cause:?}");
}

#[test]
fn benches_on_the_host_say_so() {
    let output = bench(&["--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["engine"], report.get("baseline")), (&"host".into(), None));
    for phase in ["dispatch", "combine"] {
        assert!(report["speed_of_light"][phase].as_f64().unwrap() > 0.0);
        assert!(report["gbs_per_rank"][phase].as_f64() < report["gbs"][phase].as_f64());
    }
}

/// Where there is no driver these fail and say so; where there is one, it depends on the devices whether they work.
#[test]
fn engines_without_a_driver_are_one_error() {
    let world = ["--nodes", "1", "--ranks-per-node", "2", "--engine", "cuda", "--devices", "0"];
    let outputs = [replay(TRACE, &world), bench(&["--engine", "cuda", "--blocks", "2", "--warps", "4"])];
    for output in outputs {
        match railhop::device::cuda::devices() {
            Err(missing) => failed(&output, 1, &missing.to_string()),
            Ok(_) if output.status.success() => {}
            Ok(_) => failed(&output, 1, ""),
        }
    }
}

#[test]
fn a_baseline_that_cannot_run_names_what_is_missing() {
    let output = bench(&["--baseline", "nccl"]);
    if !output.status.success() {
        failed(&output, 1, "error: --baseline nccl: ");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(["libnccl.so", "libnvrtc.so", "CUDA driver", "GPU"].iter().any(|what| stderr.contains(what)));
    }
    failed(&bench(&["--baseline", "nccl", "--dtype", "fp8"]), 1, "BF16");
    failed(&bench(&["--baseline", "mpi"]), 2, "--baseline");
}

#[test]
fn engines_and_devices_that_make_no_sense_are_refused() {
    for devices in ["0,x", "-1", "0,,1", "", "18446744073709551616"] {
        let devices = format!("--devices={devices}");
        refused(TRACE, &["--engine", "cuda", &devices], 2, "--devices");
        failed(&bench(&["--engine", "cuda", &devices]), 2, "--devices");
    }
    refused(TRACE, &["--engine", "gpu"], 2, "--engine");
    refused(TRACE, &["--devices", "0"], 1, "it needs --engine cuda");
    failed(&bench(&["--devices", "0"]), 1, "it needs --engine cuda");
    failed(&bench(&["--warps", "4"]), 1, "they need --engine cuda");
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
