//! Where the ranks of a command are: threads of one process, or processes of which this is one.

use std::error::Error;
use std::thread;
use std::time::Duration;

use railhop::bootstrap::{BootstrapError, Launcher, Member, Store, StoreConfig};
use railhop::{Communicator, Config, ConfigBuilder, LocalWorld, Network, ProcessWorld, Topology, wire};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::meeting::{self, Meeting};
use crate::options::NetworkArgs;

/// The world of one process, unless another is asked for.
const DEFAULT_WORLD: (usize, usize) = (2, 4);

type Failure = Box<dyn Error + Send + Sync>;

/// Which ranks there are, and where.
#[derive(Debug, Clone, clap::Args)]
pub struct WorldArgs {
    /// Nodes of the world [default: those of the launcher; 2 in one process]
    #[arg(long, requires = "ranks_per_node")]
    nodes: Option<usize>,
    /// Ranks of each node [default: those of the launcher; 4 in one process]
    #[arg(long, requires = "nodes")]
    ranks_per_node: Option<usize>,
    /// Be one rank of a world of processes, as the launcher says, even of one [default: if there are several]
    #[arg(long, conflicts_with = "in_process")]
    processes: bool,
    /// Run all ranks in this process, whatever a launcher says
    #[arg(long)]
    in_process: bool,
    #[command(flatten)]
    network: NetworkArgs,
}

/// Why a command has no world.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// The world that was asked for is not the launcher's.
    #[error(
        "--nodes {nodes} --ranks-per-node {ranks_per_node} is a world of {} ranks, but there are {processes} \
         processes (by {launcher})",
        nodes.saturating_mul(*ranks_per_node)
    )]
    OtherSize { nodes: usize, ranks_per_node: usize, processes: usize, launcher: Launcher },
    /// Something needs all ranks in one process.
    #[error("{0} is for ranks of one process: add --in-process")]
    NotInProcess(&'static str),
}

impl WorldArgs {
    /// The world to run in. The processes of a launcher have come together then: by `deadline`, as all their meetings.
    pub fn world(&self, deadline: Duration) -> Result<World, Failure> {
        let Some(member) = self.member()? else { return Ok(World::Threads { args: self.clone(), deadline }) };
        let store = Store::connect(&StoreConfig::of(&member, wire::layout(), deadline)?)?;
        Ok(World::Processes { args: self.clone(), member, meeting: Meeting::new(store, deadline) })
    }

    /// What this process is among several; none if it is to be alone.
    fn member(&self) -> Result<Option<Member>, BootstrapError> {
        match Member::from_environment() {
            _ if self.in_process => Ok(None),
            Err(BootstrapError::NoLauncher) if !self.processes => Ok(None),
            Ok(member) if !self.processes && member.world_size == 1 => Ok(None),
            found => found.map(Some),
        }
    }

    fn topology(&self) -> Option<(usize, usize)> {
        self.nodes.zip(self.ranks_per_node)
    }
}

/// What a command must know of its world before it settles a configuration.
pub struct Place {
    /// Nodes and ranks.
    pub topology: Topology,
    /// What this process is among several.
    member: Option<Member>,
    network: Network,
}

impl Place {
    fn of_threads(args: &WorldArgs) -> Result<Self, Failure> {
        let (nodes, ranks_per_node) = args.topology().unwrap_or(DEFAULT_WORLD);
        let topology = Topology::new(nodes, ranks_per_node)?;
        Ok(Self { topology, member: None, network: args.network.network(None) })
    }

    fn of_member(args: &WorldArgs, member: &Member, meeting: &mut Meeting) -> Result<Self, Failure> {
        let topology = match args.topology() {
            None => meeting.topology(member)?,
            Some((nodes, ranks_per_node)) if nodes.checked_mul(ranks_per_node) == Some(member.world_size) => {
                Topology::new(nodes, ranks_per_node)?
            }
            Some((nodes, ranks_per_node)) => {
                let (processes, launcher) = (member.world_size, member.launcher);
                return Err(WorldError::OtherSize { nodes, ranks_per_node, processes, launcher }.into());
            }
        };
        Ok(Self {
            topology,
            member: Some(member.clone()),
            network: args.network.network(member.interface.clone()),
        })
    }

    /// What the configuration starts from. Processes of a machine share its cores, and what ranks must agree on does not
    /// depend on a machine.
    pub fn builder(&self) -> ConfigBuilder {
        let builder = Config::builder(self.topology).network(self.network.clone());
        match &self.member {
            None => builder,
            Some(member) => {
                let builder = builder.channels(1).worker_budget((cores() / self.here(member)).max(1));
                match self.topology.nodes() {
                    1 => builder,
                    _ => builder.chunk_tokens(Network::CHUNK_TOKENS).ring_slots(Network::RING_SLOTS),
                }
            }
        }
    }

    /// Ranks on this machine, as far as is known.
    fn here(&self, member: &Member) -> usize {
        member.local.map_or(self.topology.ranks_per_node(), |local| local.size)
    }

    /// Refuses `what` where ranks are processes.
    pub fn require_threads(&self, what: &'static str) -> Result<(), WorldError> {
        match self.member {
            None => Ok(()),
            Some(_) => Err(WorldError::NotInProcess(what)),
        }
    }

    /// Workers of all ranks together, as far as there are cores for them; none if ranks are on several machines.
    pub fn workers(&self, config: &Config) -> Option<usize> {
        match &self.member {
            None => Some(config.worker_budget()),
            Some(member) if member.is_remote() => None,
            Some(member) => Some((config.worker_budget() * member.world_size).min(cores())),
        }
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get())
}

/// What the ranks of a command do.
pub trait Work: Sync {
    /// What a rank comes to.
    type Outcome: Serialize + DeserializeOwned + Send;

    /// What ranks must have in common beside the configuration, for people: ranks with different ones don't start.
    fn agreement(&self) -> String;

    /// The settled configuration.
    fn config(&self) -> &Config;

    /// One rank's part.
    fn rank(&self, communicator: Communicator, meeting: &mut Meeting) -> Result<Self::Outcome, Failure>;
}

/// Work that is done, and by rank what it came to.
pub type Done<W> = (W, Vec<<W as Work>::Outcome>);

/// Ranks that have not begun.
pub enum World {
    /// All of them.
    Threads { args: WorldArgs, deadline: Duration },
    /// One, and where it meets the others.
    Processes { args: WorldArgs, member: Member, meeting: Meeting },
}

impl World {
    /// Prepares the work and lets all ranks do it; what it came to, in the process that is to say it: the one there is,
    /// or that of rank 0.
    pub fn run<W: Work>(
        self,
        prepare: impl FnOnce(Place) -> Result<W, Failure>,
    ) -> Result<Option<Done<W>>, Failure> {
        match self {
            Self::Threads { args, deadline } => {
                let work = prepare(Place::of_threads(&args)?)?;
                let outcomes = run_threads(&work, deadline)?;
                Ok(Some((work, outcomes)))
            }
            Self::Processes { args, member, mut meeting } => {
                let work = Place::of_member(&args, &member, &mut meeting).and_then(prepare);
                let work = meeting.join(work.map_err(|failure| failure.to_string()))?;
                let outcomes = run_process(&work, &mut meeting)?;
                Ok((member.rank == 0).then_some((work, outcomes)))
            }
        }
    }
}

fn run_process<W: Work>(work: &W, meeting: &mut Meeting) -> Result<Vec<W::Outcome>, Failure> {
    meeting.agree(&work.agreement())?;
    let communicator = ProcessWorld::join(meeting.ranks(), work.config().clone())?;
    let outcome = work.rank(communicator, meeting)?;
    Ok(meeting.gather(&outcome)?)
}

fn run_threads<W: Work>(work: &W, deadline: Duration) -> Result<Vec<W::Outcome>, Failure> {
    let communicators = LocalWorld::new(work.config().clone())?.into_communicators();
    meeting::on_threads(communicators, deadline, |communicator, meeting| work.rank(communicator, meeting))
}
