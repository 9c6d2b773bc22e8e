//! Processors.

use std::thread::available_parallelism;

use serde_json::json;

use super::finding::{Finding, Topic};
use super::machine::Machine;

/// What is here of processors.
pub fn findings(machine: &Machine) -> Vec<Finding> {
    let online = machine.read("/sys/devices/system/cpu/online");
    let allowed = machine.field("/proc/self/status", "Cpus_allowed_list");
    let cores = available_parallelism().map_or(1, usize::from);
    let word = |list: &Option<String>| list.clone().unwrap_or_else(|| "unknown".to_string());
    let value = format!("{cores} for this process: {} of {}", word(&allowed), word(&online));
    let found = Finding::ok(Topic::Cores, "cores", value)
        .with(json!({ "available": cores, "allowed": allowed, "online": online }))
        .warn_if(
            allowed != online,
            "the launcher or a container binds this process: ranks share these cores",
        );
    vec![found]
}
