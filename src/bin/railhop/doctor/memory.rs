//! Memory that is pinned, shared, huge, limited.

use railhop::budget::Bytes;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Resource, getrlimit};
use serde_json::json;

use super::finding::{Finding, Topic};
use super::machine::Machine;

/// A region is hardly ever smaller.
const SMALL_REGION: u64 = 1 << 30;

/// What is here of memory.
pub fn findings(machine: &Machine) -> Vec<Finding> {
    vec![total(machine), memlock(), shared(), huge_pages(machine), transparent(machine)]
}

/// In words.
fn bytes(count: u64) -> String {
    Bytes(count as f64).to_string()
}

/// What the machine has, or what this process may have of it.
fn total(machine: &Machine) -> Finding {
    let total = kib(machine, "MemTotal");
    let limit = limit(machine);
    let here = total.map_or("unknown".to_string(), bytes);
    let value = match limit {
        Some(limit) => format!("{here}, of which the cgroup may have {}", bytes(limit)),
        None => format!("{here}, no cgroup limit"),
    };
    Finding::ok(Topic::Memory, "total", value).with(json!({ "bytes": total, "cgroup_limit": limit })).warn_if(
        limit.is_some_and(|limit| limit < SMALL_REGION),
        "raise the limit: `railhop plan` prints what ranks need",
    )
}

fn kib(machine: &Machine, key: &str) -> Option<u64> {
    let text = machine.field("/proc/meminfo", key)?;
    Some(text.strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// The lowest limit among this process's cgroup and those that it is in, of either version.
fn limit(machine: &Machine) -> Option<u64> {
    let groups = machine.read("/proc/self/cgroup")?;
    let limits = groups.lines().filter_map(|line| {
        let [_, controllers, path] = line.splitn(3, ':').collect::<Vec<_>>()[..] else { return None };
        let (mount, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => return None,
        };
        let of = |path: &std::path::Path| machine.number(format!("{mount}{}/{file}", path.display()));
        std::path::Path::new(path).ancestors().filter_map(of).min()
    });
    // Version 1 has a number for "none", as large as pages can be counted.
    limits.filter(|&limit| limit < i64::MAX as u64 >> 1).min()
}

/// Memory that a NIC reads and writes must stay where it is.
fn memlock() -> Finding {
    let limit = getrlimit(Resource::Memlock).current;
    let value = limit.map_or("unlimited".to_string(), bytes);
    Finding::ok(Topic::Memory, "memlock limit", value).with(json!({ "bytes": limit })).warn_if(
        limit.is_some_and(|limit| limit < SMALL_REGION),
        "ulimit -l unlimited (LimitMEMLOCK=infinity in a service): RDMA pins each rank's region, whose size `railhop \
         plan` prints",
    )
}

/// Memory that ranks of a node share has no name: /dev/shm is not needed, nor its size a limit.
fn shared() -> Finding {
    let made = memfd_create("railhop-doctor", MemfdFlags::CLOEXEC).and_then(|file| ftruncate(&file, 1 << 20));
    match made {
        Ok(()) => Finding::ok(Topic::Memory, "shared", "memfd works"),
        Err(error) => Finding::ok(Topic::Memory, "shared", format!("memfd_create fails: {error}"))
            .missing("allow memfd_create (seccomp?): ranks of a node can share no memory without it"),
    }
}

fn huge_pages(machine: &Machine) -> Finding {
    let count = |key: &str| machine.field("/proc/meminfo", key).and_then(|text| text.parse::<u64>().ok());
    let (total, free) = (count("HugePages_Total").unwrap_or(0), count("HugePages_Free").unwrap_or(0));
    let size = kib(machine, "Hugepagesize").unwrap_or(0);
    Finding::ok(Topic::Memory, "huge pages", format!("{free} of {total} free, {} each", bytes(size)))
        .with(json!({ "total": total, "free": free, "bytes": size }))
}

fn transparent(machine: &Machine) -> Finding {
    let setting = |file: &str| machine.chosen(format!("/sys/kernel/mm/transparent_hugepage/{file}"));
    let (enabled, shared) = (setting("enabled"), setting("shmem_enabled"));
    let word = |setting: &Option<String>| setting.clone().unwrap_or_else(|| "unknown".to_string());
    let is_off = |setting: &Option<String>| matches!(setting.as_deref(), Some("never" | "deny"));
    Finding::ok(
        Topic::Memory,
        "transparent huge pages",
        format!("{}, for shared memory {}", word(&enabled), word(&shared)),
    )
    .with(json!({ "enabled": enabled, "shmem_enabled": shared }))
    .warn_if(
        is_off(&shared),
        "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled: shared regions then take fewer TLB entries",
    )
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::finding::State;
    use super::*;

    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let machine = Machine::at(root.path());
        (root, machine)
    }

    #[test]
    fn the_lowest_limit_of_all_groups_counts() {
        let (_root, machine) = machine(&[
            ("proc/self/cgroup", "0::/job/step\n"),
            ("proc/meminfo", "MemTotal:  4 kB\n"),
            ("sys/fs/cgroup/job/step/memory.max", "max\n"),
            ("sys/fs/cgroup/job/memory.max", "1048576\n"),
        ]);
        let found = total(&machine);
        assert_eq!((found.state, &found.details["cgroup_limit"]), (State::Warning, &1_048_576.into()));
        assert_eq!(found.details["bytes"], 4096);
    }

    #[test]
    fn version_1_has_a_number_for_no_limit() {
        let files = |limit| {
            [
                ("proc/self/cgroup", "5:cpu:/\n4:memory:/\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", limit),
            ]
        };
        assert_eq!(limit(&machine(&files("9223372036854771712\n")).1), None);
        let (_root, machine) = machine(&files("77\n"));
        assert_eq!(limit(&machine), Some(77));
    }

    #[test]
    fn huge_pages_are_counted_and_settings_read() {
        let (_root, machine) = machine(&[
            (
                "proc/meminfo",
                "HugePages_Total:      12\nHugePages_Free:       10\nHugepagesize:       2048 kB\n",
            ),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
            (
                "sys/kernel/mm/transparent_hugepage/shmem_enabled",
                "always within_size advise [never] deny force\n",
            ),
        ]);
        assert_eq!(huge_pages(&machine).details, json!({ "total": 12, "free": 10, "bytes": 2 << 20 }));
        let found = transparent(&machine);
        assert_eq!((found.state, &found.details["enabled"]), (State::Warning, &"madvise".into()));
    }
}
