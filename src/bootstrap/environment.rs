//! What launchers say in the environment.

use std::fmt;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::error::BootstrapError;
use super::hostlist::{expand_hosts, tasks_of_node};
use super::{Bootstrap, machine};
use crate::interface::Interface;
use crate::topology::Topology;

/// Where ports lie that are derived from a job's id: below those that systems give to outgoing connections, and clear
/// of what launchers use themselves.
pub const PORTS: Range<u16> = 20_000..28_000;

pub(super) const INTERFACE: &str = "RAILHOP_INTERFACE";
pub(super) const SECRET_FILE: &str = "RAILHOP_SECRET_FILE";
const STORE: &str = "RAILHOP_STORE";
const JOB_ID: &str = "RAILHOP_JOB_ID";

/// What has started the processes of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Launcher {
    /// PyTorch's, or whatever sets `RANK` and its kin.
    Torchrun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// `mpiexec` of MPICH and its descendants, Intel's among them.
    Mpich,
    /// `srun`.
    Slurm,
    /// None: `RAILHOP_RANK` and its kin say it all.
    Explicit,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Torchrun => "torchrun",
            Self::OpenMpi => "Open MPI",
            Self::Mpich => "MPICH",
            Self::Slurm => "Slurm",
            Self::Explicit => "RAILHOP_RANK",
        })
    }
}

/// Names of the variables that hold a number, the first that is set counts.
type Names = &'static [&'static str];

/// What a launcher sets.
struct Source {
    launcher: Launcher,
    /// It has started this process if all of these are set.
    signs: Names,
    rank: Names,
    world_size: Names,
    local_rank: Names,
    local_size: Names,
    node: Names,
}

const EXPLICIT: Source = Source {
    launcher: Launcher::Explicit,
    signs: &["RAILHOP_RANK"],
    rank: &["RAILHOP_RANK"],
    world_size: &["RAILHOP_WORLD_SIZE"],
    local_rank: &["RAILHOP_LOCAL_RANK"],
    local_size: &["RAILHOP_LOCAL_SIZE"],
    node: &[],
};

const MPICH: Source = Source {
    launcher: Launcher::Mpich,
    signs: &["PMI_RANK", "MPI_LOCALRANKID"],
    rank: &["RAILHOP_RANK", "PMI_RANK"],
    world_size: &["RAILHOP_WORLD_SIZE", "PMI_SIZE"],
    local_rank: &["RAILHOP_LOCAL_RANK", "MPI_LOCALRANKID"],
    local_size: &["RAILHOP_LOCAL_SIZE", "MPI_LOCALNRANKS"],
    node: &[],
};

/// By precedence: launchers that others start come first. Slurm sets `PMI_RANK` as well, but no `MPI_LOCALRANKID`.
const SOURCES: [Source; 6] = [
    Source {
        launcher: Launcher::Torchrun,
        signs: &["RANK", "WORLD_SIZE"],
        rank: &["RAILHOP_RANK", "RANK"],
        world_size: &["RAILHOP_WORLD_SIZE", "WORLD_SIZE"],
        local_rank: &["RAILHOP_LOCAL_RANK", "LOCAL_RANK"],
        local_size: &["RAILHOP_LOCAL_SIZE", "LOCAL_WORLD_SIZE"],
        node: &["GROUP_RANK"],
    },
    Source {
        launcher: Launcher::OpenMpi,
        signs: &["OMPI_COMM_WORLD_RANK"],
        rank: &["RAILHOP_RANK", "OMPI_COMM_WORLD_RANK"],
        world_size: &["RAILHOP_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"],
        local_rank: &["RAILHOP_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"],
        local_size: &["RAILHOP_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"],
        node: &[],
    },
    MPICH,
    Source {
        launcher: Launcher::Slurm,
        signs: &["SLURM_PROCID", "SLURM_LOCALID"],
        rank: &["RAILHOP_RANK", "SLURM_PROCID"],
        world_size: &["RAILHOP_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
        local_rank: &["RAILHOP_LOCAL_RANK", "SLURM_LOCALID"],
        // Slurm's own is a list over nodes.
        local_size: &["RAILHOP_LOCAL_SIZE"],
        node: &["SLURM_NODEID"],
    },
    Source { signs: &["PMI_RANK"], ..MPICH },
    EXPLICIT,
];

/// A host, by name or address, and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    /// The host.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    /// Reads `host:port`, with brackets around an IPv6 address.
    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').ok_or("host:port is needed")?;
        let port = match port.parse() {
            Ok(0) | Err(_) => return Err(format!("{port:?} is not a port")),
            Ok(port) => port,
        };
        let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        match inner.unwrap_or(host) {
            "" => Err("the host is missing".into()),
            host if host.contains(':') && inner.is_none() => Err("an IPv6 address needs brackets".into()),
            host => Ok(Self { host: host.into(), port }),
        }
    }
}

/// The port in [`PORTS`] for a job: every rank comes to the same, and different jobs hardly ever do.
pub fn derived_port(job_id: &str) -> u16 {
    let hash = blake3::hash(job_id.as_bytes());
    let number = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("8 of 32 bytes"));
    PORTS.start + (number % PORTS.len() as u64) as u16
}

/// A process's place on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    /// Its index there.
    pub rank: usize,
    /// Number of ranks there.
    pub size: usize,
}

/// A process's place in a job, as its launcher says it:
///
/// | | torchrun | Open MPI | MPICH, Intel MPI | Slurm | overrides all |
/// |---|---|---|---|---|---|
/// | rank | `RANK` | `OMPI_COMM_WORLD_RANK` | `PMI_RANK` | `SLURM_PROCID` | `RAILHOP_RANK` |
/// | world size | `WORLD_SIZE` | `OMPI_COMM_WORLD_SIZE` | `PMI_SIZE` | `SLURM_STEP_NUM_TASKS`, `SLURM_NTASKS` | `RAILHOP_WORLD_SIZE` |
/// | local rank | `LOCAL_RANK` | `OMPI_COMM_WORLD_LOCAL_RANK` | `MPI_LOCALRANKID` | `SLURM_LOCALID` | `RAILHOP_LOCAL_RANK` |
/// | local size | `LOCAL_WORLD_SIZE` | `OMPI_COMM_WORLD_LOCAL_SIZE` | `MPI_LOCALNRANKS` | `SLURM_STEP_TASKS_PER_NODE`, `SLURM_TASKS_PER_NODE` | `RAILHOP_LOCAL_SIZE` |
/// | node | `GROUP_RANK` | | | `SLURM_NODEID` | |
/// | rank 0's host | `MASTER_ADDR` | | | first of `SLURM_STEP_NODELIST`, `SLURM_JOB_NODELIST` | `RAILHOP_STORE` (host:port) |
/// | job | `TORCHELASTIC_RUN_ID`, `TORCHELASTIC_RESTART_COUNT`, `MASTER_ADDR`, `MASTER_PORT` | `PMIX_NAMESPACE` | | `SLURM_JOB_ID`, `SLURM_STEP_ID` | `RAILHOP_JOB_ID` |
///
/// Beside these, `RAILHOP_SECRET_FILE` names a file with the job's secret, and `RAILHOP_INTERFACE` the network by which
/// ranks are reached: by the address of one, or by `eth0` or `10.0.0.0/16`, which may be the same on all machines. An empty
/// variable is one that is not set. Launchers nest (Slurm starts `mpirun`, a job script starts torchrun), so the innermost
/// counts: the order of the columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Its place on its node, where the launcher says it.
    pub local: Option<Local>,
    /// Its node, where the launcher says it.
    pub node: Option<usize>,
    /// Where rank 0 serves the store.
    pub store: Address,
    /// The network by which this rank is reached, if it is not that of the store: there rank 0 listens.
    pub interface: Option<Interface>,
    /// The file with the job's secret.
    pub secret_file: Option<PathBuf>,
    /// What tells the job from others; may be empty where there is a secret.
    pub job_id: String,
    /// Who says so.
    pub launcher: Launcher,
}

impl Member {
    /// From the environment of this process.
    ///
    /// # Errors
    /// As for [`Member::from_lookup`].
    pub fn from_environment() -> Result<Self, BootstrapError> {
        Self::from_lookup(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// From variables as `lookup` gives them.
    ///
    /// # Errors
    /// No launcher is recognised, or a variable is missing, malformed or contradicts another.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, BootstrapError> {
        let variables = Variables { lookup: &lookup };
        let is_set = |name: &&str| variables.get(name).is_some();
        let source = SOURCES.iter().find(|source| source.signs.iter().all(is_set));
        variables.member(source.ok_or(BootstrapError::NoLauncher)?)
    }

    /// The variables that say this to a process that is to be started, whatever else started the one that starts it.
    /// Set them where all of [`Member::variables`] have been removed: [`Member::from_environment`] then gives this
    /// member there, with its `node` left out and [`Launcher::Explicit`] in its `launcher`.
    pub fn explicit_variables(&self) -> Vec<(&'static str, String)> {
        let local = self.local.into_iter().flat_map(|local| {
            [("RAILHOP_LOCAL_RANK", local.rank.to_string()), ("RAILHOP_LOCAL_SIZE", local.size.to_string())]
        });
        let always = [
            ("RAILHOP_RANK", self.rank.to_string()),
            ("RAILHOP_WORLD_SIZE", self.world_size.to_string()),
            (STORE, self.store.to_string()),
            (JOB_ID, self.job_id.clone()),
        ];
        let interface = self.interface.as_ref().map(|interface| (INTERFACE, interface.to_string()));
        let secret = self.secret_file.as_ref().map(|path| (SECRET_FILE, path.display().to_string()));
        always.into_iter().chain(local).chain(interface).chain(secret).collect()
    }

    /// All variables by which a launcher is recognised or a member's place is known.
    pub fn variables() -> impl Iterator<Item = &'static str> {
        let of = |source: &Source| {
            let Source { signs, rank, world_size, local_rank, local_size, node, launcher: _ } = *source;
            [signs, rank, world_size, local_rank, local_size, node]
        };
        let places = SOURCES.iter().flat_map(of).flatten().copied();
        places.chain([STORE, JOB_ID, INTERFACE, SECRET_FILE])
    }

    /// Whether some ranks may run on other machines.
    pub fn is_remote(&self) -> bool {
        self.local.is_none_or(|local| local.size < self.world_size)
    }

    /// The world's shape: as many ranks on each node as on this one. Where the launcher does not say it, those that can
    /// share memory are a node: then all ranks exchange who they are by `bootstrap`.
    ///
    /// # Errors
    /// As for [`Member::topology`]; the exchange fails.
    pub fn find_topology(
        &self,
        bootstrap: &mut dyn Bootstrap,
        deadline: Duration,
    ) -> Result<Topology, BootstrapError> {
        match self.local {
            Some(_) => self.topology(),
            None => machine::topology(bootstrap, deadline),
        }
    }

    /// The world's shape as the launcher says it: as many ranks on each node as on this one.
    ///
    /// # Errors
    /// The launcher does not say it; ranks are not numbered node by node, or nodes differ in size, so far as this rank can see; a shape that
    /// [`Topology::new`] refuses.
    pub fn topology(&self) -> Result<Topology, BootstrapError> {
        let refuse = |variable: &str, value: usize, reason: String| BootstrapError::Environment {
            variable: variable.into(),
            value: Some(value.to_string()),
            reason,
        };
        let Some(local) = self.local else {
            let (variable, reason) =
                (self.source().local_size_name().into(), "it is needed to know the nodes".into());
            return Err(BootstrapError::Environment { variable, value: None, reason });
        };
        if !self.world_size.is_multiple_of(local.size) {
            let reason = format!("{} ranks are not so many on each node", self.world_size);
            return Err(refuse(self.source().local_size_name(), local.size, reason));
        }
        let topology = Topology::new(self.world_size / local.size, local.size)?;
        let expected = topology.local_of(self.rank);
        if expected != local.rank {
            let reason = format!(
                "rank {} should be {expected} on its node: ranks must be numbered node by node (srun \
                 --distribution=block, mpirun --map-by slot)",
                self.rank
            );
            return Err(refuse(self.source().local_rank_name(), local.rank, reason));
        }
        Ok(topology)
    }

    fn source(&self) -> &'static Source {
        SOURCES.iter().find(|source| source.launcher == self.launcher).unwrap_or(&EXPLICIT)
    }
}

impl Source {
    /// The variable to blame for a local rank.
    fn local_rank_name(&self) -> &'static str {
        self.local_rank.last().copied().unwrap_or_default()
    }

    /// The variable to blame for a local size.
    fn local_size_name(&self) -> &'static str {
        match self.launcher {
            Launcher::Slurm => "SLURM_STEP_TASKS_PER_NODE",
            _ => self.local_size.last().copied().unwrap_or_default(),
        }
    }
}

/// A number, and where it comes from.
#[derive(Clone, Copy)]
struct Number {
    name: &'static str,
    value: usize,
}

struct Variables<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl Variables<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.lookup)(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
    }

    /// The first of `names` that is set.
    fn first(&self, names: Names) -> Option<(&'static str, String)> {
        names.iter().find_map(|&name| Some((name, self.get(name)?)))
    }

    fn refuse(&self, variable: &str, reason: impl Into<String>) -> BootstrapError {
        BootstrapError::Environment {
            variable: variable.into(),
            value: self.get(variable),
            reason: reason.into(),
        }
    }

    fn number(&self, names: Names) -> Result<Option<Number>, BootstrapError> {
        let Some((name, text)) = self.first(names) else { return Ok(None) };
        match text.parse() {
            Ok(value) => Ok(Some(Number { name, value })),
            Err(_) => Err(self.refuse(name, "not a number")),
        }
    }

    /// A number without which there is no member.
    fn needed(&self, names: Names) -> Result<Number, BootstrapError> {
        let own = names.first().copied().unwrap_or_default();
        let launchers = names.get(1..).unwrap_or_default().join(", ");
        match self.number(names)? {
            Some(number) => Ok(number),
            None if launchers.is_empty() => Err(self.refuse(own, "this variable is needed")),
            None => Err(self.refuse(own, format!("neither is {launchers}; one of them is needed"))),
        }
    }

    /// A rank and the size it must be below.
    fn check(&self, rank: Number, size: Number) -> Result<(), BootstrapError> {
        if size.value == 0 {
            return Err(self.refuse(size.name, "there is at least one rank"));
        }
        if rank.value >= size.value {
            return Err(self.refuse(rank.name, format!("must be below {} = {}", size.name, size.value)));
        }
        Ok(())
    }

    fn member(&self, source: &Source) -> Result<Member, BootstrapError> {
        let (rank, size) = (self.needed(source.rank)?, self.needed(source.world_size)?);
        let node = self.number(source.node)?;
        self.check(rank, size)?;
        let local = self.local(source, node, size)?;
        let job_id = self.job_id(source.launcher);
        let secret_file = self.get(SECRET_FILE).map(PathBuf::from);
        let is_local = local.is_some_and(|local| local.size == size.value);
        let store = self.store(source.launcher, job_id.as_deref(), is_local)?;
        if job_id.is_none() && secret_file.is_none() {
            let reason = "nothing tells this job from others: set it to a name of its own, the same on all ranks, \
                          or RAILHOP_SECRET_FILE";
            return Err(self.refuse(JOB_ID, reason));
        }
        Ok(Member {
            rank: rank.value,
            world_size: size.value,
            local,
            node: node.map(|node| node.value),
            store,
            interface: self.interface()?,
            secret_file,
            job_id: job_id.unwrap_or_default(),
            launcher: source.launcher,
        })
    }

    /// The place on the node, if anything is said of it.
    fn local(
        &self,
        source: &Source,
        node: Option<Number>,
        world: Number,
    ) -> Result<Option<Local>, BootstrapError> {
        if self.first(source.local_rank).is_none() && self.first(source.local_size).is_none() {
            // A world of one has no other place.
            return Ok((world.value == 1).then_some(Local { rank: 0, size: 1 }));
        }
        let (rank, size) = (self.needed(source.local_rank)?, self.local_size(source, node)?);
        self.check(rank, size)?;
        if size.value > world.value {
            let reason = format!("more ranks on a node than {} = {}", world.name, world.value);
            return Err(self.refuse(size.name, reason));
        }
        Ok(Some(Local { rank: rank.value, size: size.value }))
    }

    fn local_size(&self, source: &Source, node: Option<Number>) -> Result<Number, BootstrapError> {
        if source.launcher != Launcher::Slurm || self.get("RAILHOP_LOCAL_SIZE").is_some() {
            return self.needed(source.local_size);
        }
        let lists: Names = &["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"];
        let Some((name, list)) = self.first(lists) else {
            return Err(
                self.refuse("RAILHOP_LOCAL_SIZE", format!("neither is {}; one is needed", lists.join(", ")))
            );
        };
        let node =
            node.ok_or_else(|| self.refuse("SLURM_NODEID", "it is needed beside the tasks per node"))?;
        let value = tasks_of_node(&list, node.value).map_err(|reason| self.refuse(name, reason))?;
        Ok(Number { name, value })
    }

    /// What all processes of the job have in common, and no other job has.
    fn job_id(&self, launcher: Launcher) -> Option<String> {
        if let Some(id) = self.get(JOB_ID) {
            return Some(id);
        }
        let or = |name, other: &str| self.get(name).unwrap_or_else(|| other.into());
        match launcher {
            Launcher::Torchrun => {
                // The run's id is often the same for all ("none"): the address of its own store is not. After a
                // restart, processes of the attempt before may still be there.
                let (run, restart) =
                    (or("TORCHELASTIC_RUN_ID", "none"), or("TORCHELASTIC_RESTART_COUNT", "0"));
                let (host, port) = (self.get("MASTER_ADDR")?, or("MASTER_PORT", "0"));
                Some(format!("{run}.{restart}@{host}:{port}"))
            }
            Launcher::OpenMpi => self.get("PMIX_NAMESPACE").or_else(|| self.get("OMPI_MCA_ess_base_jobid")),
            Launcher::Slurm => {
                let job = self.get("SLURM_JOB_ID").or_else(|| self.get("SLURM_JOBID"))?;
                Some(format!("{job}.{}", or("SLURM_STEP_ID", "0")))
            }
            Launcher::Mpich | Launcher::Explicit => None,
        }
    }

    /// Where rank 0 serves. The port is never the launcher's own: torchrun's `MASTER_PORT` is taken by PyTorch's store.
    fn store(
        &self,
        launcher: Launcher,
        job_id: Option<&str>,
        is_local: bool,
    ) -> Result<Address, BootstrapError> {
        if let Some(text) = self.get(STORE) {
            return text.parse().map_err(|reason: String| self.refuse(STORE, reason));
        }
        let host = match self.master(launcher)? {
            Some(host) if launcher == Launcher::Torchrun || !is_local => host,
            _ if is_local => Ipv4Addr::LOCALHOST.to_string(),
            _ => {
                let reason = format!("{launcher} does not say where rank 0 runs; set it to host:port there");
                return Err(self.refuse(STORE, reason));
            }
        };
        match job_id {
            Some(id) => Ok(Address { host, port: derived_port(id) }),
            None => Err(self.refuse(
                STORE,
                format!("{launcher} gives no job id to derive a port from; set it to host:port, or {JOB_ID}"),
            )),
        }
    }

    /// The host of rank 0, where the launcher says it.
    fn master(&self, launcher: Launcher) -> Result<Option<String>, BootstrapError> {
        let lists: Names = &["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
        match launcher {
            Launcher::Torchrun => Ok(self.get("MASTER_ADDR").map(|host| unbracketed(&host).to_string())),
            Launcher::Slurm => match self.first(lists) {
                Some((name, list)) => {
                    let hosts = expand_hosts(&list).map_err(|reason| self.refuse(name, reason))?;
                    Ok(hosts.into_iter().next())
                }
                None => Ok(None),
            },
            Launcher::OpenMpi | Launcher::Mpich | Launcher::Explicit => Ok(None),
        }
    }

    fn interface(&self) -> Result<Option<Interface>, BootstrapError> {
        let read = |text: String| unbracketed(&text).parse();
        self.get(INTERFACE).map(read).transpose().map_err(|reason: String| self.refuse(INTERFACE, reason))
    }
}

/// An IPv6 address is as good with brackets as without.
fn unbracketed(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `NAME=value` words say, later ones first.
    fn member(words: &str) -> Result<Member, BootstrapError> {
        Member::from_lookup(|name| {
            let mut pairs = words.split_whitespace().filter_map(|word| word.split_once('='));
            pairs.rfind(|(key, _)| *key == name).map(|(_, value)| value.into())
        })
    }

    /// The variable that is blamed, and its value.
    fn blamed(words: &str) -> (String, Option<String>) {
        match member(words) {
            Err(BootstrapError::Environment { variable, value, .. }) => (variable, value),
            other => panic!("{words}: {other:?}"),
        }
    }

    fn blames(words: &str, variable: &str, value: Option<&str>) {
        assert_eq!(blamed(words), (variable.into(), value.map(Into::into)), "{words}");
    }

    /// torchrun --nnodes=2 --nproc-per-node=4, second node.
    const TORCHRUN: &str = "LOCAL_RANK=2 RANK=6 GROUP_RANK=1 ROLE_RANK=6 ROLE_NAME=default LOCAL_WORLD_SIZE=4 \
        WORLD_SIZE=8 GROUP_WORLD_SIZE=2 ROLE_WORLD_SIZE=8 MASTER_ADDR=node-a.example MASTER_PORT=29400 \
        TORCHELASTIC_RESTART_COUNT=0 TORCHELASTIC_MAX_RESTARTS=3 TORCHELASTIC_RUN_ID=run7 \
        TORCHELASTIC_USE_AGENT_STORE=True OMP_NUM_THREADS=1";

    /// srun -N4 -n8 in a job of four nodes.
    const SLURM: &str = "SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=8 SLURM_NPROCS=8 SLURM_NODEID=2 \
        SLURM_STEP_NUM_TASKS=8 SLURM_STEP_NUM_NODES=4 SLURM_STEP_TASKS_PER_NODE=2(x4) SLURM_TASKS_PER_NODE=2(x4) \
        SLURM_STEP_NODELIST=gpu[03-05,9],login1 SLURM_JOB_NODELIST=gpu[01-09] SLURM_JOB_ID=4711 SLURM_STEP_ID=2 \
        SLURM_TOPOLOGY_ADDR=gpu05 PMI_RANK=5 PMI_SIZE=8";

    /// mpirun -n 2 of Open MPI 4.1.4 on one machine.
    const OPEN_MPI: &str = "OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_NODE_RANK=1 \
        OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_UNIVERSE_SIZE=2 PMIX_NAMESPACE=512753665 PMIX_RANK=1";

    /// mpiexec -n 4 of MPICH's Hydra.
    const MPICH: &str = "PMI_RANK=3 PMI_SIZE=4 PMI_FD=9 MPI_LOCALRANKID=3 MPI_LOCALNRANKS=4";

    const EXPLICIT: &str = "RAILHOP_RANK=1 RAILHOP_WORLD_SIZE=4 RAILHOP_LOCAL_RANK=1 RAILHOP_LOCAL_SIZE=2 \
        RAILHOP_STORE=[fd00::2]:7777 RAILHOP_SECRET_FILE=/run/secret RAILHOP_INTERFACE=fd00::3";

    fn place(member: &Member) -> [usize; 4] {
        let local = member.local.unwrap();
        [member.rank, member.world_size, local.rank, local.size]
    }

    #[test]
    fn torchrun_gives_host_and_job() {
        let got = member(TORCHRUN).unwrap();
        assert_eq!((place(&got), got.node, got.launcher), ([6, 8, 2, 4], Some(1), Launcher::Torchrun));
        assert_eq!(got.job_id, "run7.0@node-a.example:29400");
        let port = derived_port(&got.job_id);
        assert_eq!(got.store, Address { host: "node-a.example".into(), port });
        assert_eq!(got.topology().unwrap(), Topology::new(2, 4).unwrap());
        // The attempt after a restart is another job.
        let next = member(&format!("{TORCHRUN} TORCHELASTIC_RESTART_COUNT=1")).unwrap();
        assert_ne!(next.job_id, got.job_id);
        assert_eq!(member(&format!("{TORCHRUN} MASTER_ADDR=[fd00::1]")).unwrap().store.host, "fd00::1");
    }

    #[test]
    fn slurm_gives_lists() {
        let got = member(SLURM).unwrap();
        assert_eq!((place(&got), got.node, got.launcher), ([5, 8, 1, 2], Some(2), Launcher::Slurm));
        assert_eq!((got.job_id.as_str(), got.store.host.as_str()), ("4711.2", "gpu03"));
        assert_eq!(got.topology().unwrap(), Topology::new(4, 2).unwrap());
        // A node that is larger than the others.
        let uneven = member(&format!("{SLURM} SLURM_STEP_TASKS_PER_NODE=1(x2),5,1")).unwrap();
        assert_eq!(uneven.local.unwrap().size, 5);
        assert!(matches!(uneven.topology(), Err(BootstrapError::Environment { variable, .. })
            if variable == "SLURM_STEP_TASKS_PER_NODE"));
        // All on one node: nothing leaves the machine.
        let local = member(&format!("{SLURM} SLURM_STEP_TASKS_PER_NODE=8 SLURM_NODEID=0 SLURM_LOCALID=5"));
        assert_eq!(local.unwrap().store.host, "127.0.0.1");
        blames(&format!("{SLURM} SLURM_STEP_NODELIST=gpu[3"), "SLURM_STEP_NODELIST", Some("gpu[3"));
        blames(
            &format!("{SLURM} SLURM_STEP_TASKS_PER_NODE=2(x2)"),
            "SLURM_STEP_TASKS_PER_NODE",
            Some("2(x2)"),
        );
        blames(&format!("{SLURM} SLURM_NODEID="), "SLURM_NODEID", None);
        blames(
            &format!("{SLURM} SLURM_STEP_TASKS_PER_NODE= SLURM_TASKS_PER_NODE="),
            "RAILHOP_LOCAL_SIZE",
            None,
        );
        blames(
            &format!("{SLURM} SLURM_STEP_NODELIST= SLURM_JOB_NODELIST= SLURM_NODELIST="),
            "RAILHOP_STORE",
            None,
        );
    }

    #[test]
    fn ranks_must_be_numbered_node_by_node() {
        // srun --distribution=cyclic: rank 5 is the second on node 1 of 4, which blocks would make rank 3.
        let cyclic =
            member(&format!("{SLURM} SLURM_NODEID=1 SLURM_LOCALID=1 SLURM_PROCID=4")).unwrap().topology();
        assert!(matches!(&cyclic, Err(BootstrapError::Environment { variable, value: Some(value), .. })
            if variable == "SLURM_LOCALID" && value == "1"));
        assert!(cyclic.unwrap_err().to_string().contains("--distribution=block"));
        let wide = format!("{OPEN_MPI} OMPI_COMM_WORLD_SIZE=65 OMPI_COMM_WORLD_LOCAL_SIZE=65");
        assert!(matches!(member(&wide).unwrap().topology(), Err(BootstrapError::Config(_))));
    }

    #[test]
    fn open_mpi_is_local_or_needs_an_address() {
        let got = member(OPEN_MPI).unwrap();
        assert_eq!((place(&got), got.node, got.launcher), ([1, 2, 1, 2], None, Launcher::OpenMpi));
        assert_eq!(got.job_id, "512753665");
        let port = derived_port("512753665");
        assert_eq!(got.store, Address { host: "127.0.0.1".into(), port });
        let remote = format!("{OPEN_MPI} OMPI_COMM_WORLD_SIZE=4");
        blames(&remote, "RAILHOP_STORE", None);
        let remote = member(&format!("{remote} RAILHOP_STORE=a:9")).unwrap();
        assert_eq!(remote.store, Address { host: "a".into(), port: 9 });
        // Started by Slurm, whose variables are those of the daemon.
        let nested = member(&format!("{SLURM} {OPEN_MPI}")).unwrap();
        assert_eq!((nested.launcher, nested.rank), (Launcher::OpenMpi, 1));
    }

    #[test]
    fn mpich_needs_a_job_id() {
        blames(MPICH, "RAILHOP_STORE", None);
        blames(&format!("{MPICH} RAILHOP_STORE=a:9"), "RAILHOP_JOB_ID", None);
        let got = member(&format!("{MPICH} RAILHOP_JOB_ID=j")).unwrap();
        assert_eq!((place(&got), got.launcher), ([3, 4, 3, 4], Launcher::Mpich));
        assert_eq!(got.store, Address { host: "127.0.0.1".into(), port: derived_port("j") });
        let nested = member(&format!("{SLURM} {MPICH} RAILHOP_JOB_ID=j")).unwrap();
        assert_eq!((nested.launcher, nested.rank), (Launcher::Mpich, 3));
        assert_eq!(place(&member("PMI_RANK=0 PMI_SIZE=1 RAILHOP_JOB_ID=j").unwrap()), [0, 1, 0, 1]);
        // Where nothing is said of nodes, rank 0 may be anywhere.
        blames("PMI_RANK=0 PMI_SIZE=2 RAILHOP_JOB_ID=j", "RAILHOP_STORE", None);
        let scattered = member("PMI_RANK=0 PMI_SIZE=2 RAILHOP_JOB_ID=j RAILHOP_STORE=a:9").unwrap();
        assert!(scattered.local.is_none() && scattered.is_remote() && scattered.topology().is_err());
    }

    #[test]
    fn explicit_variables_are_enough_and_override() {
        let got = member(EXPLICIT).unwrap();
        assert_eq!((place(&got), got.node, got.launcher), ([1, 4, 1, 2], None, Launcher::Explicit));
        assert_eq!(got.store, Address { host: "fd00::2".into(), port: 7777 });
        assert_eq!(got.secret_file, Some("/run/secret".into()));
        assert_eq!(got.interface, Some(Interface::Address("fd00::3".parse().unwrap())));
        assert_eq!(got.job_id, "");
        let over = member(&format!("{TORCHRUN} {EXPLICIT} RAILHOP_WORLD_SIZE=")).unwrap();
        assert_eq!((place(&over), over.launcher), ([1, 8, 1, 2], Launcher::Torchrun));
        assert_eq!(over.store.port, 7777);
        blames(&format!("{EXPLICIT} RAILHOP_STORE=a"), "RAILHOP_STORE", Some("a"));
        let named = member(&format!("{EXPLICIT} RAILHOP_INTERFACE=eth0")).unwrap();
        assert_eq!(named.interface, Some(Interface::Name("eth0".into())));
        blames(
            &format!("{EXPLICIT} RAILHOP_INTERFACE=10.0.0.0/33"),
            "RAILHOP_INTERFACE",
            Some("10.0.0.0/33"),
        );
        blames(&format!("{EXPLICIT} RAILHOP_LOCAL_SIZE="), "RAILHOP_LOCAL_SIZE", None);
    }

    #[test]
    fn a_member_can_be_told_what_it_is() {
        for outer in [TORCHRUN, SLURM, OPEN_MPI, EXPLICIT, &format!("{MPICH} RAILHOP_JOB_ID=j")] {
            let mut given = member(EXPLICIT).unwrap();
            given.job_id = "inner".into();
            let told: std::collections::BTreeMap<_, _> = given.explicit_variables().into_iter().collect();
            let got = Member::from_lookup(|name| match told.get(name) {
                Some(value) => Some(value.clone()),
                None if Member::variables().any(|removed| removed == name) => None,
                None => outer
                    .split_whitespace()
                    .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
                    .map(Into::into),
            });
            assert_eq!(got.unwrap(), given, "{outer}");
        }
    }

    #[test]
    fn contradictions_name_variable_and_value() {
        for (words, variable, value) in [
            ("RANK=8", "RANK", "8"),
            ("RANK=x", "RANK", "x"),
            ("RANK=-1", "RANK", "-1"),
            ("WORLD_SIZE=0", "WORLD_SIZE", "0"),
            ("LOCAL_RANK=4", "LOCAL_RANK", "4"),
            ("LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE", "0"),
            ("LOCAL_WORLD_SIZE=9", "LOCAL_WORLD_SIZE", "9"),
            ("GROUP_RANK=first", "GROUP_RANK", "first"),
            ("RAILHOP_RANK=9", "RAILHOP_RANK", "9"),
            ("WORLD_SIZE=18446744073709551616", "WORLD_SIZE", "18446744073709551616"),
        ] {
            blames(&format!("{TORCHRUN} {words}"), variable, Some(value));
        }
        let missing = member(&format!("{TORCHRUN} LOCAL_RANK=")).unwrap_err().to_string();
        assert!(
            missing.contains("RAILHOP_LOCAL_RANK is not set") && missing.contains(" LOCAL_RANK"),
            "{missing}"
        );
        let error = member(&format!("{TORCHRUN} RANK=9")).unwrap_err().to_string();
        assert_eq!(error, "RANK = \"9\": must be below WORLD_SIZE = 8");
    }

    #[test]
    fn nothing_is_no_launcher() {
        assert_eq!(member(""), Err(BootstrapError::NoLauncher));
        assert_eq!(member("RANK= MASTER_ADDR=a HOME=/root"), Err(BootstrapError::NoLauncher));
    }

    #[test]
    fn ports_are_fixed_and_in_range() {
        assert_eq!(derived_port("4711.2"), 20658);
        let ports: std::collections::BTreeSet<u16> =
            (0..1000).map(|n| derived_port(&n.to_string())).collect();
        assert!(ports.iter().all(|port| PORTS.contains(port)));
        assert!(ports.len() > 900, "{}", ports.len());
    }

    #[test]
    fn addresses_read_as_they_print() {
        for text in ["a:1", "127.0.0.1:29500", "[::1]:65535"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in ["", "a", ":1", "a:", "a:0", "a:65536", "::1:9", "[]:9", "a:x"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
