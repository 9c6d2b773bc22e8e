//! `railhop doctor`, on whatever machine this is. What it makes of others, its own tests say.

#![cfg(all(feature = "cli", target_os = "linux"))]

use std::process::{Command, Output};

use railhop::bootstrap::Member;
use serde_json::Value;

const RAILHOP: &str = env!("CARGO_BIN_EXE_railhop");

/// `railhop doctor` where no launcher has said anything.
fn doctor(words: &[&str]) -> Output {
    let mut command = Command::new(RAILHOP);
    command.arg("doctor").args(words);
    for variable in Member::variables() {
        command.env_remove(variable);
    }
    command.output().unwrap()
}

fn findings(report: &[u8], topic: &str) -> Vec<Value> {
    let report: Value = serde_json::from_slice(report).unwrap();
    report[topic].as_array().unwrap().clone()
}

#[test]
fn every_topic_has_findings_and_every_fault_advice() {
    let output = doctor(&["--json"]);
    assert_eq!(output.status.code(), Some(0));
    for topic in ["rdma", "gpu", "memory", "cores", "network", "launcher"] {
        let found = findings(&output.stdout, topic);
        assert!(!found.is_empty(), "{topic}");
        for finding in found {
            let is_ok = match finding["state"].as_str() {
                Some("ok") => true,
                Some("warning" | "missing") => false,
                _ => panic!("{finding}"),
            };
            assert_eq!(finding["advice"].is_null(), is_ok, "{finding}");
            assert!(finding["value"].is_string() && finding["name"].is_string(), "{finding}");
        }
    }
    let loopback =
        findings(&output.stdout, "network").into_iter().find(|finding| finding["name"] == "lo").unwrap();
    assert!(loopback["details"]["addresses"].as_array().unwrap().contains(&"127.0.0.1".into()));
    assert_eq!(findings(&output.stdout, "memory")[2]["value"], "memfd works");
}

#[test]
fn people_get_a_table() {
    let output = doctor(&[]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(
        table.contains("launcher") && table.contains("no launcher found") && table.contains("→"),
        "{table}"
    );
}

#[test]
fn what_is_required_must_not_be_missing() {
    assert_eq!(doctor(&["--require", "memory,cores"]).status.code(), Some(0));
    assert_eq!(doctor(&["--require", "memory,launcher"]).status.code(), Some(1));
    assert_eq!(doctor(&["--require", "magic"]).status.code(), Some(2));
}

#[test]
fn a_rank_is_told_its_place() {
    let output = Command::new(RAILHOP)
        .args([
            "launch",
            "-n",
            "1",
            "--no-prefix",
            "--",
            RAILHOP,
            "doctor",
            "--json",
            "--require",
            "launcher",
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found = findings(&output.stdout, "launcher");
    assert_eq!(found[0]["details"]["world_size"], 1);
    assert_eq!(found[1]["details"]["has_job_id"], true);
}
