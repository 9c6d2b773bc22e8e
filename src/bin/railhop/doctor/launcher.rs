//! What the environment says of this process's place in a job. Neither the job's id nor its secret is printed.

use railhop::Interface;
use railhop::bootstrap::{BootstrapError, Launcher, Member};
use serde_json::json;

use super::finding::{Finding, Topic};

/// What a launcher has said, in variables as `lookup` gives them.
pub fn findings(lookup: impl Fn(&str) -> Option<String>) -> Vec<Finding> {
    let name = "environment";
    match Member::from_lookup(lookup) {
        Ok(member) => vec![place(&member), store(&member), topology(&member)],
        Err(error @ BootstrapError::NoLauncher) => vec![Finding::ok(Topic::Launcher, name, error.to_string()).missing(
            "start ranks with torchrun, srun, mpirun or `railhop launch`; a program of one process needs none",
        )],
        Err(error) => {
            vec![Finding::ok(Topic::Launcher, name, error.to_string()).missing("set or correct this variable")]
        }
    }
}

fn place(member: &Member) -> Finding {
    let Member { rank, world_size, local, node, launcher, .. } = member;
    let by = match launcher {
        Launcher::Explicit => "RAILHOP_RANK and its kin".to_string(),
        known => known.to_string(),
    };
    let on_node =
        local.map_or("somewhere".into(), |local| format!("{} of {} on its node", local.rank, local.size));
    let value = format!("rank {rank} of {world_size}, {on_node}, by {by}");
    Finding::ok(Topic::Launcher, "place", value).with(json!({
        "rank": rank, "world_size": world_size, "local_rank": local.map(|local| local.rank), "local_size": local.map(|local| local.size), "node": node,
        "launcher": launcher.to_string(),
    }))
}

fn store(member: &Member) -> Finding {
    let (has_id, has_secret) = (!member.job_id.is_empty(), member.secret_file.is_some());
    let interface = member.interface.as_ref().map_or(String::new(), |named| format!(", interface {named}"));
    let known_by = match (has_id, has_secret) {
        (true, true) => "a job id and a secret",
        (true, false) => "a job id",
        (false, _) => "a secret",
    };
    let value = format!("{}{interface}, known by {known_by}", member.store);
    let finding = Finding::ok(Topic::Launcher, "store", value).with(json!({
        "address": member.store.to_string(), "interface": member.interface.as_ref().map(Interface::to_string),
        "has_job_id": has_id, "has_secret": has_secret,
    }));
    finding.warn_if(
        member.is_remote() && !has_secret && member.launcher != Launcher::Explicit,
        "launchers' job ids can be guessed: where others share the network, give all ranks a RAILHOP_SECRET_FILE",
    )
}

fn topology(member: &Member) -> Finding {
    match member.topology() {
        Ok(topology) => {
            let (nodes, each) = (topology.nodes(), topology.ranks_per_node());
            let finding = Finding::ok(Topic::Launcher, "topology", format!("{nodes} nodes of {each} ranks"));
            finding.with(json!({ "nodes": nodes, "ranks_per_node": each }))
        }
        Err(error) => Finding::ok(Topic::Launcher, "topology", error.to_string())
            .missing("start the same number of ranks on each node, numbered node by node"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    fn with(variables: &str) -> Vec<Finding> {
        findings(|name| {
            let value = |word: &str| word.strip_prefix(name)?.strip_prefix('=').map(String::from);
            variables.split_whitespace().find_map(value)
        })
    }

    const RANK: &str = "RAILHOP_RANK=3 RAILHOP_WORLD_SIZE=4 RAILHOP_LOCAL_RANK=1 RAILHOP_LOCAL_SIZE=2 \
        RAILHOP_STORE=a:9 RAILHOP_JOB_ID=hush";

    #[test]
    fn a_place_is_told_without_its_secrets() {
        let found = with(RANK);
        let values: Vec<_> = found.iter().map(|finding| &finding.value[..]).collect();
        assert_eq!(values[0], "rank 3 of 4, 1 of 2 on its node, by RAILHOP_RANK and its kin");
        assert_eq!(values[1..], ["a:9, known by a job id", "2 nodes of 2 ranks"]);
        assert!(found.iter().all(|finding| !finding.json().to_string().contains("hush")));
        assert!(found.iter().all(|finding| finding.state == State::Ok));
    }

    #[test]
    fn ids_that_others_can_guess_are_worth_a_warning() {
        let torchrun = format!("{RANK} RANK=3 WORLD_SIZE=4");
        assert_eq!(with(&torchrun)[1].state, State::Warning);
        let secret = with(&format!("{torchrun} RAILHOP_SECRET_FILE=/run/s"));
        assert_eq!((secret[1].state, &secret[1].details["has_secret"]), (State::Ok, &true.into()));
    }

    #[test]
    fn what_is_wrong_is_missing() {
        assert_eq!(with("")[0].state, State::Missing);
        let wrong = with(&RANK.replace("RANK=3", "RANK=x"));
        assert_eq!(wrong[0].state, State::Missing);
        assert!(wrong[0].value.contains("RAILHOP_RANK = \"x\""), "{}", wrong[0].value);
        let cyclic = with(&RANK.replace("LOCAL_RANK=1", "LOCAL_RANK=0"));
        assert_eq!(cyclic[2].state, State::Missing);
    }
}
