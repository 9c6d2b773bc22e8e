//! `railhop launch`: a world of processes on this machine.
//!
//! | file | what it knows |
//! |---|---|
//! | `place` | what each rank is told of its world |
//! | `network` | a network namespace for each node |
//! | `rank` | a rank as a process |
//! | `output` | lines that say whose they are |
//! | `supervisor` | the life of a world: signals, the first failure, the end |

mod network;
mod output;
mod place;
mod rank;
mod supervisor;

use std::error::Error;
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use railhop::Topology;
use railhop::error::ConfigError;

use self::network::Network;
use self::place::Job;
use self::rank::Program;
use self::supervisor::{Event, Supervisor};

/// What `--help` says beside the options.
const RULES: &str = "\
Every rank finds in its environment what a bootstrap needs, and nothing on stdin. Signals are passed on to all ranks.
When a rank fails the others get SIGTERM, and SIGKILL after the grace; the exit code is that of the first failure
(128 + the signal that ended it, 127 or 126 where the program can't be started). Ranks die with the launcher, even with
one that is killed.";

/// A world of processes on this machine.
#[derive(Debug, clap::Args)]
#[command(after_help = RULES)]
pub struct LaunchArgs {
    /// Ranks of the world
    #[arg(short = 'n', long)]
    ranks: usize,
    /// Ranks of each node [default: all]
    #[arg(long)]
    ranks_per_node: Option<usize>,
    /// Give each node a network namespace of its own; needs root
    #[arg(long)]
    netns: bool,
    /// Limit each node's link to this rate, both ways: 10gbit, say, as `tc` reads it
    #[arg(long, requires = "netns")]
    rate: Option<String>,
    /// Let ranks write where the launcher does, without `[rank] ` before each line
    #[arg(long)]
    no_prefix: bool,
    /// Seconds that ranks have to end when one has failed
    #[arg(long, default_value = "5", value_parser = seconds)]
    grace: Duration,
    /// Say on stderr which process is which rank, and how each ended
    #[arg(short, long)]
    verbose: bool,
    /// What each rank runs
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

impl LaunchArgs {
    fn topology(&self) -> Result<Topology, ConfigError> {
        let (ranks, each) = (self.ranks, self.ranks_per_node.unwrap_or(self.ranks));
        if each > 0 && !ranks.is_multiple_of(each) {
            let reason = format!("{ranks} ranks are not so many on each node");
            return Err(ConfigError {
                field: "ranks_per_node",
                value: each as u64,
                reason,
                nearest: (1..=each).rev().find(|each| ranks.is_multiple_of(*each)).map(|each| each as u64),
            });
        }
        Topology::new(ranks.checked_div(each).unwrap_or(1), each)
    }
}

/// Runs the world; the code to exit with.
pub fn run(args: &LaunchArgs) -> Result<ExitCode, Box<dyn Error + Send + Sync>> {
    let topology = args.topology()?;
    // Before there is anything that a signal would have to end.
    let mut supervisor = Supervisor::new(args.grace, args.verbose)?;
    let network = args.netns.then(|| Network::new(topology.nodes(), args.rate.as_deref())).transpose()?;
    let job = Job::new(topology, network.as_ref().map(Network::addresses))?;
    let program = Program { words: &args.program, is_prefixed: !args.no_prefix };
    for rank in 0..topology.world_size() {
        let namespace =
            network.as_ref().map(|network| network.namespace(topology.node_of(rank))).transpose()?;
        match program.start(&job.member(rank), namespace, supervisor.over()) {
            Ok(rank) => supervisor.add(rank)?,
            Err(failure) => {
                crate::complain(&failure);
                supervisor.notice(Event::NotStarted(failure.code()));
                break;
            }
        }
    }
    Ok(supervisor.run().into())
}
